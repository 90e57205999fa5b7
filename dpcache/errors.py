"""The one kind of error that is the user's to mend."""


class SettingError(ValueError):
    """A setting, or a combination of settings, model and method, that is not possible. Its message is one line that
    names the setting and what is allowed; the command line prints that line alone. Any other exception is a bug and
    shows its traceback."""
