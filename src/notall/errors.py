"""What a user did wrong, said in one line."""


class UsageError(ValueError):
    """Bad input: the message is one clear line that names the fix. The command line prints it and exits with 2."""


class UnsupportedModel(UsageError):
    """The model is not an embedding, a residual stream of sublayers and a head; the message says where it differs."""


class UnknownArchitecture(UsageError):
    """An engine has no code for this architecture at all, whatever its files hold."""


def shortened(said: str, most: int = 60) -> str:
    """What a message quotes: one line of at most `most` characters, all of them printable."""
    line = "".join(letter if letter.isprintable() else "�" for letter in " ".join(said.split()))
    return line if len(line) <= most else f"{line[:most]}…"
