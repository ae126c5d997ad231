"""The report: what a project folder holds, as one HTML page and as a picture."""
