# SPDX-License-Identifier: Apache-2.0
"""The process of a server: `vllm serve` until SIGTERM, then what it and its workers ran.

Run as `python -m workspace.bench.server_run JOB.json PORT` by workspace.bench.server.
"""

import sys
from pathlib import Path

from workspace.bench import loaded
from workspace.bench.engine_run import know_dummy_weights, what_ran
from workspace.bench.messages import SERVER, Job
from workspace.bench.variants import HOST
from workspace.host.files import write_file


def main() -> None:
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    port = sys.argv[2]
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.main import main as command
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm_files = loaded.files_hash(Path(vllm.__file__).parent)
    know_dummy_weights(job.server)
    _, model, *options = job.server  # `vllm serve` takes the model without --model
    sys.argv = ["vllm", "serve", model, *options, "--host", HOST, "--port", port]
    command()

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    engine = AsyncEngineArgs.from_cli_args(parser.parse_args(job.server))
    ran = what_ran(job, engine.create_model_config(), vllm_files)
    write_file(job.folder / SERVER, ran.model_dump_json().encode())


if __name__ == "__main__":
    main()
