"""Jobs: commands that the page starts, each in a process of its own that outlives the server and waits for its turn."""
