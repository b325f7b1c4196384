"""Wrong command lines of the explorer: the same three as in lines.py."""

EXPLORER = [
    ("explorer look", 2, "No such command 'look'"),
    ("explorer serve", 2, "nothing to show"),
    ("explorer serve --store {missing}", 2, "{missing}"),
    ("explorer --store {emptydir}", 2, "{emptydir}"),
    ("explorer --store nosuch://bucket/x", 2, "nosuch"),
    ("explorer --runs {missing}", 2, "{missing}"),
    ("explorer --images {missing}", 2, "{missing}"),
    ("explorer --model {missing}", 2, "no published model"),
    ("explorer --images {emptydir} --port 65536", 2, "--port"),
    ("explorer --images {emptydir} --host nosuch.invalid", 1, "cannot listen on --host nosuch.invalid"),
    ("explorer --images {emptydir} --tls-cert {missing}", 2, "{missing}"),
    ("explorer --images {emptydir} --token-file {empty}", 2, "{empty} has no token"),
    ("explorer map", 2, "Missing argument"),
    ("explorer map out.parquet", 2, "name a --run or a --store"),
    ("explorer map out.csv --store {missing}", 2, "has to end with .parquet"),
    ("explorer map out.parquet --store {missing}", 2, "{missing}"),
    ("explorer map out.parquet --run {missing}", 2, "{missing} is not a run's folder"),
    ("explorer export", 2, "Missing argument"),
    ("explorer export {missing} --images {emptydir} --most-files 1", 2, "--most-files"),
    ("explorer export {script} --images {emptydir}", 2, "something else than an export"),
]
