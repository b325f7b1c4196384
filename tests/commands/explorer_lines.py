"""Wrong command lines of the explorer: the same three as in lines.py."""

SCORER = "--model {model} --scorer http"
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
    ("explorer serve --images {emptydir} --token-file {garbage}", 2, "--token-file {garbage} is no ASCII text"),
    ("explorer serve --images {emptydir} --tls-cert {garbage} --tls-key {garbage}", 2, "{garbage} has no certificate"),
    (
        f"explorer serve {SCORER}://127.0.0.1:1 --scorer-token-file {{garbage}}",
        2,
        "--scorer-token-file {garbage}",
    ),
    (
        f"explorer serve {SCORER}s://127.0.0.1:1 --scorer-ca {{garbage}}",
        2,
        "--scorer-ca {garbage}: it has",
    ),
    (f"explorer serve {SCORER}s://127.0.0.1:1 --scorer-ca {{missing}}", 2, "--scorer-ca {missing}: No such file"),
    ("explorer map", 2, "Missing argument"),
    ("explorer map out.parquet", 2, "name a --run or a --store"),
    ("explorer map out.csv --store {missing}", 2, "Invalid value for OUT: out.csv has to end with .parquet"),
    ("explorer map out.parquet --store {missing}", 2, "{missing}"),
    ("explorer map out.parquet --run {missing}", 2, "{missing} is not a run's folder"),
    ("explorer export", 2, "Missing argument"),
    ("explorer export {missing} --images {emptydir} --most-files 1", 2, "--most-files"),
    ("explorer export {script} --images {emptydir}", 2, "something else than an export"),
]
