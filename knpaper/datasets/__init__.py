"""Public data sets as queries: BLiMP, ParaRel, CounterFact and known_1000, one module each.

Every loader reads a local copy (`path=` the file, or a folder laid out as blimp/<paradigm>.jsonl,
pararel/data_all_allbags.json, counterfact/counterfact-train.json, known_1000/known_1000.json). Without a path it
fetches the file at the commit that data/public.toml names, checks its sha256 and keeps it under
$KNCORE_CACHE/public (or the platform's cache folder); what fails the check is not kept.
"""
