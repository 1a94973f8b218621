"""COCO's run-length strings, one code at a time."""


def compressed(runs):
    """The string of any runs, however long (cocoapi `maskApi.c`, `rleToString`)."""
    text = ""
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        while True:
            group, value = value & 0x1F, value >> 5
            done = value == (-1 if group & 0x10 else 0)
            text += chr(48 + (group if done else group | 0x20))
            if done:
                break
    return text
