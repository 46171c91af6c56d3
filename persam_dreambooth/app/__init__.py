"""`app`: the page in the browser. State is on disk, so a reload, another tab or a killed server loses nothing."""
