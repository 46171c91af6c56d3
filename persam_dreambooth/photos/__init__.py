"""The user's input: photos, masks, captions, label maps and data sets, each read by one rule."""
