"""What a person brings: photos, masks, captions, label maps and data sets, each read by one rule."""
