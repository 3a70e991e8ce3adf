"""Files: read, checked and written; the folder of an interrupted run."""
