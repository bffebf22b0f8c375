"""A model for whoever visits: a web page, and answers over HTTP."""
