"""The page of a report: one HTML file that needs neither network nor scripts.

Modules here turn what a file records into plain data; `templates/` turns those into HTML, and Jinja
escapes every text on the way.
"""
