"""When to try again to have what was lost.

Pure. The wait grows with the time that it has been lost already: what is back after 2 s is found within a quarter of a
second, what is back after two minutes within 15 s, and a manager that many lost is not asked by all of them at once.
"""

LEAST, MOST = 0.25, 15.0
_SHARE = 8


def pause(lost_for: float, tried_for: float, chance: float) -> float:
    """Seconds to wait after a try that took `tried_for`; `chance` is a random number in [0, 1).

    A try that took long was a wait itself.
    """
    wait = min(max(lost_for / _SHARE, LEAST), MOST) * (0.75 + chance / 2)
    return max(wait - tried_for, 0.0)
