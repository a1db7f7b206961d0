"""The pages of the admin port, one file for each subject."""
