"""One run: from its config to a finished work directory, on one process or several."""
