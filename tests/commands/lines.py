"""Wrong command lines, the exit code of each, and the problem that its one message tells, or a word that it must have.

Code 2: what was typed is wrong. Code 1: something else is. Words in braces are places of conftest.py. Numbers and
choices that an option excludes have no lines here: test_every_command.py makes them from the options themselves.
"""

from explorer.problems import Problem as ExplorerProblem
from featurestore.problems import Problem
from pipeline.problems import Problem as PipelineProblem
from serving.problems import Problem as ServingProblem
from tests.commands.calls import HUGE, Told
from trainer.problems import Problem as TrainerProblem

NO_FILE = {"where": "{missing}"}
MISSING = [
    ("jobs/refresh_features --images {emptydir} --store {missing}", 2, (PipelineProblem.NO_STORE_YET, NO_FILE)),
    *((line, 2, (Problem.NO_STORE, NO_FILE)) for line in (
        "featurestore compact {missing}", "featurestore diff {missing} 1 2", "featurestore expire {missing}",
        "featurestore log {missing}", "featurestore quarantine {missing}", "featurestore pin {missing} a",
        "featurestore restore {missing} 1", "featurestore unpin {missing} a", "featurestore info {missing}",
        "featurestore get {missing} 1000", "featurestore channel {missing}", "featurestore serve {missing}",
        "featurestore verify {missing}", "featurestore repair {missing}",
        "featurestore remake {missing} {new} --dims 2", "trainer.compat {run} {missing}",
        "jobs/publish_vectors --model {model} --store images={missing}",
    )),
    *((line, 2, (ServingProblem.NO_MODEL, {"where": "{missing}"})) for line in (
        "jobs/score --model {missing} --samples {missing} --out {new}.parquet", "serving info {missing}",
        "serving check {missing}", "serving expire {missing}", "serving log {missing}", "serving use {missing} 1",
        "jobs/publish_vectors --model {missing}", "explorer --model {missing}",
    )),
    *((line, 2, "{missing}") for line in (
        "trainer.compat {missing} {store}", "trainer.evaluate {missing}",
        "trainer.daily data.samples={missing} --set run.dir={new}",
        "trainer.tune --set data.samples={missing} --set run.dir={new} --set model.images=none",
        "trainer.plan --run {missing}", "trainer.prerank search --run {missing} --user 1",
        "trainer.schema missing {missing} {store}", "trainer.schema missing {samples} {missing}",
        "trainer.schema inspect {missing}", "trainer.schema check {missing} {samples}",
        "jobs/extract_features --images {missing} --store {new} --weights random:0",
        "jobs/extract_features --weights {missing}", "jobs/import_features --from {missing}",
        "jobs/import_xdl --from {missing} --samples {new}", "trainer.prerank build --run {missing}",
        "jobs/export_embeddings --run {missing} --out {new}.parquet", "jobs/score --run {missing} --out {new}.parquet",
        "jobs/score --run {run} --samples {missing} --out {new}.parquet",
        "jobs/score --run {run} --store {missing} --out {new}.parquet",
        "jobs/make_demo_data --out {new} --images {missing}", "jobs/build_samples --logs {missing} --samples {new}",
        "jobs/build_samples --logs {missing} --samples memory://new --scratch {new}",
        "benchmarks.extract --images {missing}", "benchmarks.tables {missing}",
        "benchmarks.tables {tables} --set data.samples={missing} --dir {new}",
        "tools/efficientnet_features --images {missing} --out {new}.npy",
        "tools/real_logs frappe {missing} --out {new}",
        "serving check {model} --run {missing} --url http://127.0.0.1:1",
        "serving check {model} --samples {missing} --url http://127.0.0.1:1",
        "serving check {model} --url http://127.0.0.1:1 --token-file {missing}",
        "serving serve {model} --token-file {missing}",
        "jobs/export_model --run {missing} --out {new}", "explorer serve --store {missing}",
        "explorer --runs {missing}", "explorer --images {missing}", "explorer export {new} --images {missing}",
    )),
]  # fmt: skip
"""A place that is not there."""

STORE, EMPTY, GARBAGE = {"where": "{store}"}, {"where": "{empty}"}, {"where": "{garbage}", "value": "{garbage}"}
STABLE, NO_HOST = STORE | {"value": "stable"}, {"where": "nosuch.invalid"}
AT_GARBAGE, EMPTYDIR, WEIGHTS = ({"where": each} for each in ("{garbage}", "{emptydir}", "{otherweights}"))
FEATURESTORE: list[tuple[str, int, Told]] = [
    ("featurestore [/x]", 2, "No such command '[/x]'"),
    ("featurestore info {brackets}", 2, "[/x]"),
    ("featurestore info {unicode}", 2, r"\u202e name é ☃"),
    ("featurestore info {empty}", 2, (Problem.FILE_NOT_FOLDER, EMPTY)),
    ("featurestore info nosuch://bucket/x", 2, (Problem.CANNOT_OPEN, {"where": "nosuch"})),
    ("featurestore info {store} --version x", 2, (Problem.NO_CHANNEL, STORE | {"value": "x", "known": "none"})),
    ("featurestore info {store} --version -1", 2, (Problem.NEGATIVE_VERSION, {"value": -1})),
    ("featurestore info {store} --version 9", 2, (Problem.NO_SNAPSHOT, STORE | {"value": 9})),
    ("featurestore info {nanstore}", 1, Problem.DAMAGED),
    ("featurestore info {deepstore}", 1, Problem.NESTED_TOO_DEEP),
    ("featurestore info {hugestore}", 1, Problem.DAMAGED),
    ("featurestore info {deepinfo}", 1, Problem.NESTED_TOO_DEEP),
    ("featurestore get {store}", 2, Problem.NO_IMAGE_NAMED),
    (f"featurestore get {{store}} {HUGE}", 2, HUGE),
    ("featurestore get {store} --uri [/x]", 1, (Problem.NO_FEATURE, {"number": 1})),
    ("featurestore channel {store} stable", 2, (Problem.NO_CHANNEL, STABLE | {"known": "none"})),
    ("featurestore channel {store} 19", 2, (Problem.NOT_A_CHANNEL_NAME, {"value": "19"})),
    ("featurestore channel {store} stable 99", 2, (Problem.NO_SNAPSHOT, STORE | {"value": 99})),
    ("featurestore channel {store} --remove", 2, "--remove"),
    ("featurestore channel {store} stable --remove", 2, (Problem.NO_CHANNEL, STABLE)),
    ("featurestore restore {store} 12", 2, (Problem.NO_SNAPSHOT, STORE | {"value": 12})),
    ("featurestore pin {store} a/b", 2, (Problem.NOT_A_PIN_NAME, {"value": "a/b"})),
    ("featurestore unpin {store} a", 2, (Problem.NO_PIN, STORE | {"value": "a"})),
    ("featurestore serve {store} --port 0 --host nosuch.invalid", 1, (Problem.CANNOT_LISTEN, NO_HOST)),
    ("featurestore serve {store} --tls-cert {garbage} --tls-key {garbage}", 1, (Problem.TLS_NOT_A_PAIR, GARBAGE)),
    ("featurestore serve {store} --token-file {empty}", 2, (Problem.NO_TOKEN, EMPTY)),
    ("featurestore serve {store} --cache-dir {empty} --port 0", 1, (Problem.CANNOT_USE_CACHE, EMPTY)),
    ("featurestore verify {store} --absent {pipe}", 2, "{pipe}"),
    ("featurestore verify {store} --absent {script} --version 1", 2, "--absent"),
    ("featurestore purge {missing} --keys {missing}", 2, (Problem.NOT_A_LIST, NO_FILE | {"wanted": "keys"})),
    ("featurestore purge {store}", 2, "--keys"),
    ("featurestore purge {store} --keys {empty} --uris {empty}", 2, "--keys"),
    ("featurestore purge {store} --keys {empty}", 2, (Problem.NOT_A_LIST, EMPTY)),
    ("featurestore check-backend {empty}", 2, (Problem.FILE_NOT_FOLDER, EMPTY)),
    ("featurestore remake {store} {new} --dims 9999", 2, (Problem.TOO_MANY_DIMS, STORE | {"value": 9999})),
    ("featurestore remake {store} {store} --dims 2", 2, (Problem.IS_THE_SOURCE, STORE)),
]

# One setting each of python -m trainer.main: what is typed there comes from people more than anything else.
SETTINGS = [
    ("data.=1", ""),
    ("[/x].[bold]=1", (TrainerProblem.SETTING_UNKNOWN, {"where": "[/x]"})),
    ("data.samples=''", "data.samples"),
    ("'data.samples={{a: b}}'", "data.samples"),
    ("'data.stores={{a: 1}}'", "data.stores"),
    ("'data.store_versions={{a: -1}}'", "data.store_versions"),
    (f"data.store_version={HUGE}", "data.store_version"),
    ("data.global_batch_size=nan", "data.global_batch_size"),
    ("data.train_days=[2026-02-30]", "data.train_days"),
    ("data.missing=[/x]", "data.missing"),
    ("data.schema_file={missing}", (TrainerProblem.NO_FILE_OF_SETTINGS, {"where": "data.schema_file={missing}"})),
    ("data.samples=!!python/object:os.system", ""),
    (f"model.tables.user={HUGE}", "model.tables"),
    ("model.tables.[/x]=a", "model.tables"),
    ("model.mlp=[[1]]", "model.mlp"),
    ("model.table_shards=3", "model.table_shards"),
    ("model.id_dropout=nan", "model.id_dropout"),
    ("optim.lr=", "optim.lr"),
    (f"run.threads={HUGE}", "run.threads"),
    ("run.deadline_s=0", "run.deadline_s"),
]

# Settings of a run whose samples and store are right.
NEAR_ITM = {"where": "itm", "hint": "did you mean model.tables.item?"}
WITH_DATA = [
    ("run.dir={new} model.tables.user=1000000000000", 2, "model.tables.user=1000000000000: 1,000,000,000,000 rows"),
    ("run.dir={new} model.tables.itm=8", 2, (TrainerProblem.TABLE_OF_NO_FIELD, NEAR_ITM)),
    ("run.resume={missing}", 2, "{missing}"),
    ("data.samples={brackets}", 2, "[/x]"),
    ("data.samples={empty}", 2, "{empty} is a file"),
    ("run.dir={empty}", 2, "{empty}"),
    ("run.dir=s3://", 2, "no bucket"),
    ("run.warm_start={missing}", 2, "run.warm_start='{missing}': "),
]

TOO_FEW = (TrainerProblem.TOO_FEW_SLOTS, {"value": 3, "slots": 2})
TRAINER = [
    *((f"trainer.main --set {setting}", 2, text) for setting, text in SETTINGS),
    *(("trainer.main data.samples={samples} data.store={store} " + line, *told) for line, *told in WITH_DATA),
    ("trainer.main --set", 2, "requires an argument"),
    ("trainer.main --config {garbage}", 2, "YAML"),
    ("trainer.main --config {samples}", 2, (TrainerProblem.SETTINGS_IN_A_FOLDER, {"where": "{samples}"})),
    ("trainer.main --config {deepyaml}", 2, Problem.NESTED_TOO_DEEP),
    ("trainer.main --config {unknown}", 2, "did you mean data.samples?"),
    ("trainer.compat {run} {store} --name [/x]", 2, "[/x]"),
    ("trainer.compat {run} {store} --json {emptydir}", 2, "{emptydir}"),
    (f"trainer.evaluate {'x' * 300}", 1, "File name too long"),
    ("trainer.evaluate {deeprun}", 1, "too deep"),
    ("trainer.evaluate {listrun}", 1, "damaged: it is not a JSON object; take another checkpoint"),
    ("trainer.evaluate {unsetrun}", 2, "config.yaml has to be a mapping of sections"),
    ("trainer.evaluate {run} --checkpoint x", 2, "x"),
    ("trainer.evaluate {run} --bootstrap 0 --out {empty}", 1, "{empty}"),
    ("trainer.daily --config {unknown}", 2, "data.smaples is unknown; did you mean data.samples?"),
    ("trainer.daily --first-day 2026-02-02 --last-day 2026-02-01 data.samples={samples}", 2, ""),
    ("trainer.daily data.samples={samples} --set run.dir={empty}", 1, "{empty}"),
    ("trainer.tune --config {unknown}", 2, "data.smaples is unknown; did you mean data.samples?"),
    ("trainer.tune --grid optim.lr=[high]", 2, "optim.lr"),
    ("trainer.evaluate {run} --bootstrap 0 --out foo://x", 2, "foo://"),
    ("trainer.prerank search --run {run} --index {missing} --user 1", 2, ""),
    ("trainer.prerank search --run {towers} --index {index} --user 987654", 2, "987654"),
    ("trainer.schema missing {samples} {store} --schema {garbage}", 2, "{garbage}"),
    ("trainer.schema lookup {missing} 3", 2, (TrainerProblem.NO_TEXTS, NO_FILE)),
    ("trainer.schema inspect {garbage_parquet}", 1, "garbage.parquet"),
    ("trainer.schema inspect {samples} --out {missing}/x.yaml", 1, "{missing}"),
    ("trainer.schema check {deepyaml} {samples}", 2, "too deep"),
    ("trainer.launch -- true", 2, TrainerProblem.NOT_A_SLURM_JOB),
    ("trainer.supervise --max-np 1 -- python -m trainer.main data.smaples=x", 2, "did you mean data.samples?"),
    ("trainer.supervise --min-np 3 --hosts a:1,b:1 -- python -m trainer.main", 2, TOO_FEW),
]

DASK_SUBMIT = [
    ("dask-submit", 2, "Missing argument"),
    ("dask-submit --no-such-option 1 2", 2, "option"),
    ("dask-submit {missing}", 2, "does not exist"),
    ("dask-submit --timeout nan {script}", 2, "--timeout"),
    ("dask-submit --memory-limit nan {script}", 2, "--memory-limit"),
    ("dask-submit -n 0 {script}", 2, "--workers"),
    ("dask-submit --scheduler tcp://127.0.0.1:1 -n 2 {script}", 2, PipelineProblem.SEVERAL_CLUSTERS),
    ("dask-submit --scheduler '' --timeout 1 {script}", 1, PipelineProblem.NO_SCHEDULER),
    ("dask-submit --scheduler tcp://127.0.0.1:99999 --timeout 1 {script}", 1, "99999"),
    ("dask-submit --scheduler-file {missing} --timeout 0.1 {script}", 1, "no such file"),
    ("dask-submit --wait-workers -1 {script}", 2, "--wait-workers"),
]

SYNC = {"where": "--sync"}
JOBS = [
    ("jobs/extract_features --images {emptydir} --weights random:0", 2, (PipelineProblem.NO_IMAGES, EMPTYDIR)),
    ("jobs/extract_features --images {there} --store {new} --weights random:0", 2, "[/x] there"),
    ("jobs/extract_features --images {garbage_csv} --store {new} --weights random:0", 1, "garbage.csv"),
    ("jobs/extract_features --images nosuch://x --store {new} --weights random:0", 2, "nosuch"),
    ("jobs/extract_features --weights random:x", 2, "random:x"),
    ("jobs/extract_features --weights imagenet:[/x]", 2, "[/x]"),
    ("jobs/extract_features --images {photos} --weights {garbage}", 2, (PipelineProblem.WEIGHTS_UNREAD, AT_GARBAGE)),
    ("jobs/extract_features --images {photos} --weights {otherweights}", 2, (PipelineProblem.OTHER_MODEL, WEIGHTS)),
    ("jobs/extract_features --backbone vgg16:[/x] --weights random:0", 2, "[/x]"),
    ("jobs/import_features --from {garbage_parquet} --store {new}", 1, "garbage.parquet"),
    ("jobs/import_features --from {garbage_npy} --store {new}", 2, "--keys"),
    ("jobs/import_features --from {garbage_npy} --keys {garbage} --store {new}", 1, "garbage.npy"),
    ("jobs/import_xdl --from {garbage} --samples {new}", 1, ""),
    ("trainer.prerank build --run {run} --out {new}", 2, "two_tower"),
    ("trainer.prerank build --ads x --samples y", 2, TrainerProblem.ADS_AND_SAMPLES),
    ("trainer.prerank build --sync x --add", 2, (TrainerProblem.DOES_NOT_GO_WITH, SYNC | {"value": "--add"})),
    ("trainer.prerank build --sync x --ads y", 2, (TrainerProblem.DOES_NOT_GO_WITH, SYNC | {"value": "--ads"})),
    ("trainer.prerank build --run {towers} --ads {garbage}", 2, (TrainerProblem.NOT_A_TABLE_OF_ADS, AT_GARBAGE)),
    ("trainer.prerank build --add --index hnsw", 2, (TrainerProblem.KIND_IS_KEPT, {"value": "--index"})),
    ("jobs/export_embeddings --run {run} --out .parquet", 2, "--out"),
    ("jobs/export_embeddings --run {run} --network [/x] --out {new}.parquet", 2, "[/x]"),
    ("jobs/export_embeddings --run {run} --store-version 99 --out {new}.parquet", 2, "99"),
    ("jobs/score --model {model} --out {new}.parquet", 2, "--samples"),
    ("jobs/score --model {model} --run {run} --out {new}.parquet", 2, "--run"),
    ("jobs/score --version 1 --out {new}.parquet", 2, "--version"),
    ("jobs/make_demo_data --out {empty} --small", 1, "{empty}"),
    ("jobs/make_demo_data --out s3://bucket/demo --small", 2, (Problem.IS_AN_ADDRESS, {"where": "s3://bucket/demo"})),
    ("jobs/make_demo_data --out {new} --labels {empty}", 2, "--labels"),
    ("jobs/make_demo_data --out {new} --images {emptydir} --items 50", 2, "--items"),
    ("jobs/build_samples --samples memory://none --since 2026-01-01", 2, "memory://none"),
    ("jobs/build_samples --samples {new} --days yesterday", 2, "--days yesterday"),
    ("jobs/build_samples --logs {missing} --samples {new} --mapping {list}", 2, "{list}"),
    ("jobs/build_samples --logs {missing} --samples {new} --mapping {badmapping}", 2, "csv.delimiter=5: it should be"),
    ("jobs/build_samples --logs {missing} --samples {new} --mapping {deepyaml}", 2, "too deep"),
    ("jobs/build_samples --logs {missing} --mapping {missing}", 2, (PipelineProblem.NO_MAPPING_FILE, NO_FILE)),
]

OTHERS = [
    ("benchmarks.extract --json {empty}/x.json", 1, "--json"),
    *((f"benchmarks.{name} --dir {{empty}}", 1, "{empty}") for name in ("growth", "serve", "store", "train")),
    ("benchmarks.gpu --device cpu --dir {empty}", 1, "{empty}"),
    ("benchmarks.tables {deepyaml}", 2, "too deep"),
    ("benchmarks.tables {tables} --config {list}", 2, "mapping"),
    ("benchmarks.tables {tables} --table nosuch", 2, "nosuch"),
    ("benchmarks.tables {tables} --dir {empty} --set data.samples={samples} --set data.store={store}", 1, "{empty}"),
    ("benchmarks.workload --out {empty}", 1, "{empty}"),
    ("benchmarks.workload --out {emptydir}/..", 1, "holds no workload"),
    ("benchmarks.train --only [/x]", 2, "[/x]"),
    ("tools/efficientnet_features --images {emptydir} --out {new}.npy", 2, "has no images"),
    ("tools/real_logs frappe {emptydir} --out {new}", 1, "frappe.csv"),
]

MODEL, NO_PEM = {"where": "{model}"}, {"where": "{garbage}", "reason": "it has no certificate"}
AT_NO_SUCH_HOST, TLS = {"where": "--host nosuch.invalid --port 8080"}, "--tls-cert {garbage} --tls-key {garbage}"
OTHER_STORE = {"where": "other={store}"}
SERVING: list[tuple[str, int, Told]] = [
    ("serving info {pipe}", 2, "{pipe} is a file"),
    ("serving info {model} --version 9", 2, (ServingProblem.NO_VERSION, MODEL | {"version": 9, "known": "version 1"})),
    ("serving info {deepmodel}", 1, "too deep"),
    ("serving check {model} --token-file {garbage}", 2, ServingProblem.NEEDS_SERVER),
    ("serving check {model} --url http://127.0.0.1:1", 1, (ServingProblem.NO_ANSWER, {"where": "http://127.0.0.1:1"})),
    ("serving check {model} --url https://127.0.0.1:1 --ca {garbage}", 2, (ServingProblem.UNUSABLE_CA, NO_PEM)),
    ("serving serve {model} --token-file {garbage}", 2, (Problem.TOKENS_NOT_ASCII, AT_GARBAGE)),
    ("serving log {listuse}", 1, "damaged"),
    ("serving serve {model} --host nosuch.invalid", 1, (ServingProblem.CANNOT_LISTEN, AT_NO_SUCH_HOST)),
    ("serving serve {model} --tls-cert {empty}", 2, (ServingProblem.UNUSABLE_PEM, {"where": "--tls-cert {empty}"})),
    ("serving serve {model} --tls-key {empty}", 2, ServingProblem.KEY_WITHOUT_CERTIFICATE),
    ("serving use {model} 2", 2, (ServingProblem.NO_VERSION, MODEL | {"version": 2})),
    ("jobs/export_model --run {run} --out {empty}", 2, "{empty} is a file"),
    ("jobs/export_model --run {run} --out {samples}", 2, (ServingProblem.OTHER_FILES, {"where": "{samples}"})),
    ("jobs/publish_vectors --model {model} --store-version 1.5", 2, "--store-version"),
    ("jobs/publish_vectors --model {model} --store other={store}", 2, (PipelineProblem.NO_SUCH_STORE, OTHER_STORE)),
    ("jobs/export_model --run {run} --out {new} --json foo://x", 2, "cannot write --json"),
]

EXPLORER = [
    ("explorer serve", 2, ExplorerProblem.NOTHING_GIVEN),
    ("explorer serve --images {emptydir} --token-file {garbage}", 2, (Problem.TOKENS_NOT_ASCII, AT_GARBAGE)),
    (f"explorer serve --images {{emptydir}} {TLS}", 2, (ServingProblem.UNUSABLE_PEM, {"where": TLS})),
    ("explorer serve --images foo://x", 2, (Problem.CANNOT_OPEN, {"where": "foo"})),
    ("explorer serve --samples /proc/x", 2, (ExplorerProblem.NO_FOLDER, {"where": "--samples", "value": "/proc/x"})),
    ("explorer export s3://bucket/x --images {emptydir}", 2, (Problem.IS_AN_ADDRESS, {"where": "s3://bucket/x"})),
    ("explorer export {script} --images {emptydir}", 2, (ExplorerProblem.NOT_EXPORT, {"where": "{script}"})),
]

PIPES = [
    *((line, 1, "not a regular file") for line in (
        "featurestore info {pipestore}", "featurestore get {store} 1000 --out {pipe}",
        "dask-submit --scheduler-file {pipe} --timeout 0.1 {script}",
        "trainer.main --set data.store={store} --set data.samples={pipesamples}",
        "trainer.main --set data.samples={samples} --set data.store={pipestore}",
        "trainer.evaluate {piperun}", "trainer.schema inspect {pipesamples}",
        "jobs/import_features --from {pipe} --store {new}",
        "jobs/import_features --from {pipe_npy} --keys {missing} --store {new}",
        "jobs/import_features --from {matrix} --keys {pipe} --store {new}",
        "jobs/import_xdl --from {pipe} --samples {new}", "jobs/build_samples --logs {pipelogs} --samples {new}",
        "trainer.prerank build --run {towers} --sync {pipe_parquet} --out {index}",
        "jobs/make_demo_data --out {new} --images {photos} --labels {pipe}",
    )),
    ("trainer.main --config {pipe}", 2, "not a regular file"),
    ("trainer.main --set data.schema_file={pipe_yaml}", 2, "not a regular file"),
    ("trainer.schema inspect {pipe_csv}", 2, "{pipe_csv}"),
    ("jobs/extract_features --images {pipe_csv} --store {new} --weights random:0", 1, "{pipe_csv}"),
    ("jobs/import_features --from {pipeimages} --store {new}", 1, PipelineProblem.ONLY_EMPTY_FILES),
]  # fmt: skip
"""A pipe in the place of a file: the command ends at once."""

LINES: list[tuple[str, int, Told]] = [*MISSING, *FEATURESTORE, *DASK_SUBMIT, *TRAINER, *JOBS, *SERVING, *EXPLORER]
LINES += [*OTHERS, *PIPES]
