"""The version of this package, and those of the packages that are installed beside it."""

__version__ = "0.1.0"


def installed(*packages: str) -> dict[str, str]:
    """Package -> its version, or 'not installed'; no package is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
