"""Export: an adapter in the files of another engine, after saying what that engine would refuse or misread."""
