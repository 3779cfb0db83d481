"""Other tools' files: import and export."""
