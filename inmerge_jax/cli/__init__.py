"""The command line: `inmerge train`, `inmerge export`, `inmerge data` and `inmerge quickstart`."""
