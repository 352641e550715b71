"""What each verb does, in terms of the rooms. `run.py` is these in order; the command line is these one by one."""
