"""The lines of a resolv.conf (resolv.conf(5)), for whoever wants something of one. Pure."""


def lines_of(text: str, *keywords: str) -> list[list[str]]:
    """The words behind the keywords, of each line that begins with one."""
    lines = map(str.split, text.splitlines())
    return [words[1:] for words in lines if words and words[0] in keywords]
