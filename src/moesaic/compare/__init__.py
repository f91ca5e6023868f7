"""`moesaic compare`: several methods at equal budget, on the same rows in the same order, over several seeds.

    out/compare.yaml      the settings; `moesaic compare out` goes on with them
    out/arms.json         what they came to: ranks, counts, the data's fingerprint
    out/tuning/ARM-lrX/   trials, where there are several learning rates: short runs, scored on validation rows
    out/cells/ARM-sSEED/  the runs: folders as `moesaic train` makes them, scored as by `moesaic eval`
    out/comparison.json   the figures, also as table.md, table.csv and report.html (see comparison.py)

The same command continues what was interrupted and tries again what failed; methods, arms and seeds may be added.
"""
