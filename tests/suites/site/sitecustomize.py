import suite_site  # noqa: F401
