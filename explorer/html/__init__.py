"""Rendering of pages: templates, links that also work in a folder of files, and the site that all pages share."""
