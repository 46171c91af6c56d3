"""The steps of the page, one file each; `app.page.STEPS` lists them."""
