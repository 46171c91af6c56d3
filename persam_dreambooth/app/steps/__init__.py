"""The steps of the page, one file each; `app.page.PAGE_STEPS` lists them."""
