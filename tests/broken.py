"""Functions that are wrong, for checks that are to see it."""


def scaled(function, part=None, factor=1.05):
    """The function with what it returns, or a part of it, wrong."""

    def wrong(*arguments):
        value = function(*arguments)
        if part is None:
            return value * factor
        if isinstance(part, int):
            return tuple(item * factor if number == part else item for number, item in enumerate(value))
        return value._replace(**{part: getattr(value, part) * factor})

    return wrong
