"""Pictures and HTML pages for the user."""
