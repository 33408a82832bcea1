"""Hub jobs: pull a repository into a folder, push a folder in one commit."""
