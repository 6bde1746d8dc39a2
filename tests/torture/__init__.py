"""Long trials of what must never happen: work lost, damage unnoticed, a hang, a traceback. See __main__.

Each module is one part and has

    CASES                        the number of its cases
    prepare(folder)              optional: what all cases share, made once, in `folder`
    case(number, seed, folder)   runs one case in `folder`, an empty one of its own; an exception is a failure, an
                                 AssertionError with the reason. What `prepare` made is in folder.parent / "shared".

A case depends on `number` and `seed` alone, so that it can be repeated, and ends by itself within minutes.
"""
