"""Command serve: the pages over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from explorer.commands.installed import check_installed
from explorer.commands.options import Images, Model, Nets, Runs, Samples, Scorer, ScorerCa, ScorerTokenFile, Store
from featurestore.console.commandline import CommandApp

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m explorer --store data/features --images photos`\n\n"
    "- `python -m explorer --store data/features --runs data/runs --samples data/samples --images photos "
    "--model data/models/ctr --port 8090`\n\n"
    "- `python -m explorer --store s3://shop/features --host 0.0.0.0 --tls-cert tls.crt --tls-key tls.key "
    "--token-file tokens.txt`"
)
def serve(
    store: Store = None,
    runs: Runs = None,
    samples: Samples = None,
    images: Images = None,
    model: Model = None,
    nets: Nets = None,
    scorer: Scorer = None,
    scorer_token_file: ScorerTokenFile = None,
    scorer_ca: ScorerCa = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8090,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain of the server, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM; by default in the file of --tls-cert.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a token a line; who looks types one of them first.")
    ] = None,
) -> None:
    """Show pages of a store, its images, runs, impressions and a scorer, in a browser. Nothing is changed."""
    check_installed()
    from explorer.places import Places
    from explorer.server.serve import serve as listen_and_answer
    from serving.http.settings import AccessSettings

    places = Places(
        store=store,
        runs=runs,
        samples=samples,
        images=images,
        model=model,
        nets=nets,
        scorer=scorer,
        scorer_token_file=scorer_token_file,
        scorer_ca=scorer_ca,
    )
    places.check()
    listen_and_answer(
        AccessSettings(host=host, port=port, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file, drain_s=5),
        places,
    )
