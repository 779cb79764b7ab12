"""Looking at samples: what one shows, how it adds up, how it is drawn on a page."""
