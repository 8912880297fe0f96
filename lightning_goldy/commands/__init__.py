"""The sub-commands of ``goldy``, one file or folder each."""
