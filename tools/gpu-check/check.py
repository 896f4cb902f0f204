"""Runs the checks of a packed trainer on the machine that it is on, and prints a row for each as it ends.

Usage: check.py [--cpu] [--out DIR] [--only NAME …]

The folder that holds this script is what `tools/gpu-check.sh` made. On a GPU libtorch and CUDA come from the PyTorch that this
Python has. With --cpu the same checks run in small on the CPU; what needs a GPU or PyTorch says so. DIR gets `results.json`, written
anew after each check, and the output of each. Ends with 1 if a check failed.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import models

HERE = pathlib.Path(__file__).resolve().parent
# The programs, compressed, so that little travels.
PROGRAMS = HERE / "release.tar.xz"
# Where the driver's libraries are, if the loader does not find them by itself.
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64",)


class Skipped(Exception):
    """What a check needs and this machine lacks."""


class Failed(Exception):
    """What a check found."""


class Machine:
    """The device, the libraries, and how programs are run on it."""

    def __init__(self, cpu, out, logs):
        # `out` is for models and runs, which stay here; `logs` comes back, also if this is cut off.
        self.cpu, self.out, self.logs = cpu, out, logs
        with tarfile.open(PROGRAMS) as archive:
            archive.extractall(out, filter="data")
        # Where the tests look for the trainer beside them.
        self.trainer, self.integration_tests = out / "release/finetune-trainer", out / "release/deps/it"
        self.environment = {**os.environ, "FINETUNE_TEST_DEVICE": "cpu" if cpu else "cuda"}
        self.libraries = []
        torch = importlib.util.find_spec("torch")
        self.has_torch = torch is not None
        if not cpu:
            if torch is None:
                sys.exit("this Python has no torch, whose libraries the trainer runs on; use one with PyTorch 2.11+cu130, or --cpu")
            folder = pathlib.Path(torch.origin).parent / "lib"
            self.libraries = [str(folder), *(folder for folder in DRIVER_FOLDERS if os.path.isdir(folder))]
            self.environment["TRAINER_TORCH_LIB"] = str(folder)
            # cuBLAS reads it when it is loaded; the trainer sets it for itself.
            self.environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        known = [path for path in self.environment.get("LD_LIBRARY_PATH", "").split(":") if path]
        if self.libraries:
            self.environment["LD_LIBRARY_PATH"] = ":".join([*self.libraries, *known])

    def run(self, name, command, seconds, folder=None):
        """Runs a command to its end or for so many seconds; its output goes to a file, and is returned."""
        path = self.logs / f"{name}.log"
        with open(path, "a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            log.flush()
            process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, cwd=folder or HERE / "tests",
                                       env=self.environment, start_new_session=True)
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise Failed(f"not done after {seconds} s; see {path.name}") from None
        text = path.read_text(errors="replace")
        if code != 0:
            errors = [line for line in text.splitlines() if "panicked at" in line or line.startswith("error")]
            raise Failed(f"ended with {code}: {' | '.join(errors[-3:]) or text[-300:]}")
        return text

    def tests(self, name, filters, seconds, threads=1):
        """Runs tests of the integration binary; at least one has to have run."""
        text = self.run(name, [self.integration_tests, *filters, "--test-threads", threads], seconds)
        passed = [int(line.split()[3]) for line in text.splitlines() if line.startswith("test result: ok.")]
        if not passed or passed[-1] == 0:
            raise Failed(f"no test of {filters} ran")
        skipped = sum("skipped: needs " in line for line in text.splitlines())
        return {"tests": passed[-1] - skipped, **({"passed over": skipped} if skipped else {})}


def libraries(machine, seconds):
    figures = machine.tests("libraries", ["processors::lora"], seconds)
    if machine.cpu:
        return figures
    names = machine.run("libraries", ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], 10)
    return {**figures, "device": names.splitlines()[-1].strip(), "libraries": ":".join(machine.libraries)}


def kernels(machine, seconds):
    return machine.tests("kernels", ["cuda::"], seconds)


def sanitizer(machine, seconds):
    program = shutil.which("compute-sanitizer")
    if machine.cpu or program is None:
        raise Skipped("compute-sanitizer and a GPU")
    tests = [machine.integration_tests, "cuda::swiglu", "cuda::rotation", "cuda::norms", "cuda::cross_entropy_is", "--test-threads", "1"]
    # Of libtorch's own kernels and calls nothing is asked; shapes are small.
    for tool, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
        command = ["env", "FINETUNE_TEST_FEW=1", program, "--tool", tool, *options, "--kernel-name", "kernel_substring=finetune", "--error-exitcode", "9", *tests]
        text = machine.run("sanitizer", command, seconds / 2)
        if "0 errors" not in text and "0 hazards" not in text:
            raise Failed(f"{tool} says nothing of errors; see sanitizer.log")
    return {"tools": "memcheck, racecheck"}


def attention(machine, seconds):
    return machine.tests("attention", ["attention::"], seconds)


def golden(machine, seconds):
    filters = ["numerics::every_gradient", "numerics::a_step_in_bf16", "numerics::packing", "numerics::recomputation", "optimizer::",
               "validation::answers_that_end"]
    if not machine.cpu:
        # On a CPU it takes the base model, which does not travel.
        filters.append("numerics::ten_steps")
    return machine.tests("golden", filters, seconds)


def resume(machine, seconds):
    filters = ["resume::sigterm_commits"]
    if not machine.cpu:
        # Every form of full fine-tuning; on a CPU `make test` has them.
        filters.append("resume::kill_9_and_sigterm")
    return machine.tests("resume", filters, seconds)


def llama(machine, seconds):
    """LoRA on the shape of Llama-3-8B, then on rows of mixed length; on a CPU on a tiny one."""
    shape, length, steps = (models.TINY, 128, 6) if machine.cpu else (models.LLAMA_8B, 4096, 23)
    folder = machine.out / "llama"
    models.write_model(folder / "model", shape)
    models.write_rows(folder / "long.jsonl", [length - 1] * 8)
    models.write_rows(folder / "mixed.jsonl", models.mixed_lengths(64, length // 8))
    figures = {}
    for rows, batch in (("long", 2), ("mixed", 16)):
        job = models.job("llama", f"{rows}.jsonl", steps, batch, length, seed=1)
        with MemoryUse(machine) as used:
            report, records = train(machine, folder, rows, job, seconds / 2)
        if (growth := used.growth()) is not None:
            figures[f"{rows}: growth"] = f"{growth:+.1%}"
            if rows == "long" and growth > 0.05:
                raise Failed(f"{rows}: memory grew over the last half of the run; {figures}")
        warm = records[3:]
        rate = sum(record["input_tokens"] for record in warm[-1:]) - records[2]["input_tokens"]
        figures[f"{rows}: tokens/s"] = round(rate / sum(record["seconds"] for record in warm))
        plan = report["plan"]
        figures[f"{rows}: peak of plan"] = round(plan["measuredPeak"] / plan["memory"]["total"], 3)
        # Steps of mixed rows are seldom as long as the longest that there can be, which is planned for.
        least = 0.9 if rows == "long" else 0
        if not machine.cpu and not least <= plan["measuredPeak"] / plan["memory"]["total"] <= 1.1:
            raise Failed(f"{rows}: peak {plan['measuredPeak']} of {plan['memory']['total']} planned; {figures}")
    return figures


class MemoryUse:
    """What is taken of the GPU's memory, twice a second while the block runs."""

    def __init__(self, machine):
        self.machine, self.samples, self.ended = machine, [], threading.Event()
        self.thread = threading.Thread(target=self.sample)

    def sample(self):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.machine.cpu and not self.ended.wait(0.5):
            self.samples.append(int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def growth(self):
        """From the middle of the time in which the most was taken to its end; None where too little was seen."""
        busy = [sample for sample in self.samples if sample > 0.8 * max(self.samples)]
        return busy[-1] / busy[len(busy) // 2] - 1 if len(busy) >= 6 else None


def memory(machine, seconds):
    """Another process takes so much of the GPU that the planned micro-batch does not fit: it is halved, and losses stay."""
    folder = machine.out / "llama"
    if machine.cpu or not (folder / "long/report.json").exists():
        raise Skipped("a GPU and the model of the check llama; on a CPU run::memory_that_runs_out tests it")
    plan = json.loads((folder / "long/report.json").read_text())["plan"]["memory"]
    # A third of activations has no room, so that half of a micro-batch has.
    left = plan["total"] - plan["activations"] // 3
    take = ("import sys, torch; free, _ = torch.cuda.mem_get_info(); held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, "
            "device='cuda'); print('held', flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", take, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if holder.stdout.readline().strip() != "held":
            raise Failed("the memory could not be taken")
        job = models.job("llama", "long.jsonl", 4, 2, 4096, seed=1)
        _, records = train(machine, folder, "memory", job, seconds)
    finally:
        holder.stdin.close()
        holder.wait()
    text = (machine.logs / "memory.log").read_text()
    if "out of memory at" not in text:
        raise Failed(f"memory did not run out with {left} bytes left of {plan['total']} planned")
    free = [json.loads(line) for line in (folder / "long/metrics.jsonl").read_text().splitlines()]
    pairs = list(zip([record["loss"] for record in free if "loss" in record], [record["loss"] for record in records]))
    worst = max(abs(a - b) / a for a, b in pairs)
    if worst > 1e-2:
        raise Failed(f"losses differ by {worst:.1e}: {pairs}")
    return {"losses differ by": f"{worst:.0e}"}


def train(machine, folder, name, job, seconds):
    (folder / f"{name}.yaml").write_text(json.dumps(job))
    machine.run(name, [machine.trainer, "run", f"{name}.yaml", "--dir", name], seconds, folder)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / name / "report.json").read_text()), [record for record in records if "loss" in record]


def peer(machine, seconds):
    """Three steps of transformers + PEFT on the same weights and rows: the first losses agree."""
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers", "peft")):
        raise Skipped("a Python with torch, transformers and peft")
    folder = machine.out / "llama"
    if not (folder / "model/config.json").exists():
        raise Skipped("the model of the check llama")
    length = 127 if machine.cpu else 4095
    text = machine.run("peer", [sys.executable, HERE / "peer.py", folder / "model", folder / "long.jsonl", str(length)], seconds)
    theirs = json.loads(next(line for line in reversed(text.splitlines()) if line.startswith('{"losses"')))
    # Two rows in all, so that each step has both, whatever their order.
    models.write_rows(folder / "two.jsonl", [length] * 2)
    job = models.job("llama", "two.jsonl", 6, 2, length + 1, seed=1)
    _, records = train(machine, folder, "two", job, seconds)
    ours = [record["loss"] for record in records]
    difference = abs(ours[0] - theirs["losses"][0]) / theirs["losses"][0]
    if difference > 0.01:
        raise Failed(f"first losses {ours[0]} and {theirs['losses'][0]}")
    rate = 2 * length * len(records[3:]) / sum(record["seconds"] for record in records[3:])
    return {"loss": round(ours[0], 4), "theirs": round(theirs["losses"][0], 4), "speed beside theirs": round(rate / theirs["tokensPerSecond"], 2)}


def stop(machine, seconds):
    """SIGTERM in the middle of a step: a checkpoint within ten seconds, and exit 75."""
    folder = machine.out / "llama"
    if not (folder / "model/config.json").exists():
        raise Skipped("the model of the check llama")
    length = 128 if machine.cpu else 4096
    job = models.job("llama", "long.jsonl", 10_000, 2, length, seed=2)
    (folder / "stop.yaml").write_text(json.dumps(job))
    with open(machine.logs / "stop.log", "w") as log:
        process = subprocess.Popen([machine.trainer, "run", "stop.yaml", "--dir", "stop"], cwd=folder, env=machine.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + seconds - 12
        metrics = folder / "stop/metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
            if time.monotonic() > deadline:
                process.kill()
                raise Failed("no third step")
            time.sleep(0.05)
        asked = time.monotonic()
        process.terminate()
        try:
            code = process.wait(timeout=12)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed("still running 12 s after SIGTERM") from None
    if code != 75:
        raise Failed(f"ended with {code}, expected 75; see stop.log")
    return {"seconds to leave": round(time.monotonic() - asked, 2)}


def answers(machine, seconds):
    """64 answers with a shared prefix of 1,000 tokens."""
    shape, prefix = (models.TINY, 200) if machine.cpu else (models.LLAMA_1B, 1000)
    folder = machine.out / "answers"
    models.write_model(folder / "model", shape)
    models.write_conversations(folder / "train.jsonl", 8, prefix // 4 - 30)
    models.write_conversations(folder / "test.jsonl", 8 if machine.cpu else 64, 12, first=1000)
    job = models.job("answers", "train.jsonl", 1, 1, 1024, seed=1)
    job["spec"]["dataset"]["validation"] = {"uri": "file://test.jsonl"}
    job["spec"]["validation"] = {"baselines": {"zeroShot": False, "fewShot": {"examples": 4}}}
    report, _ = train(machine, folder, "answers", job, seconds)
    told = report["validation"]["generation"]["fewShot"]
    return {"tokens/s": round(told["tokens"] / told["seconds"]), "tokens": told["tokens"], "peak": report["plan"]["measuredPeak"]}


def profile(machine, seconds):
    folder = machine.out / "llama"
    if not (folder / "long.yaml").exists():
        raise Skipped("the model of the check llama")
    text = machine.run("profile", [machine.trainer, "profile", "long.yaml", "--dir", "profile"], seconds, folder)
    share = next(line for line in text.splitlines() if line.startswith("matrix products, and attention"))
    percent = int(share.split(": ")[1].split(" ")[0])
    if not machine.cpu and percent == 0:
        raise Failed("no operation of the step was found on the device; see profile.log")
    return {"share of the matrix rate": f"{percent} %"}


# Name, what it does, the most seconds that it gets on a GPU.
CHECKS = [
    ("libraries", libraries, 20), ("kernels", kernels, 40), ("sanitizer", sanitizer, 60), ("attention", attention, 30),
    ("golden", golden, 40), ("resume", resume, 90), ("llama", llama, 120), ("peer", peer, 60), ("memory", memory, 40), ("stop", stop, 60),
    ("answers", answers, 40), ("profile", profile, 50),
]
# All of them together: time on a GPU is lent.
MOST_SECONDS = 470


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the same checks in small, on the CPU")
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT"), help="folder for results and logs; $OUT unless given")
    parser.add_argument("--seconds", type=int, default=MOST_SECONDS, help=f"what all checks get together, {MOST_SECONDS} unless given")
    parser.add_argument("--only", nargs="+", choices=[name for name, _, _ in CHECKS])
    arguments = parser.parse_args()
    results, end = [], time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as scratch:
        work = pathlib.Path(scratch)
        out = pathlib.Path(arguments.out) if arguments.out else work
        out.mkdir(parents=True, exist_ok=True)
        for log in out.glob("*.log"):
            log.unlink()
        machine = Machine(arguments.cpu, work, out)
        for name, check, seconds in CHECKS:
            if arguments.only and name not in arguments.only:
                continue
            started = time.monotonic()
            try:
                # A CPU that others use takes longer.
                limit = min(seconds * (3 if machine.cpu else 1), end - started)
                if limit < 5:
                    raise Skipped(f"time: {arguments.seconds} s are over")
                result, figures = "pass", check(machine, limit)
            except Skipped as needs:
                result, figures = "skipped", {"needs": str(needs)}
            except Failed as problem:
                result, figures = "FAIL", {"because": str(problem)}
            except Exception as problem:  # A check that breaks is told like one that fails, and the next one is made.
                result, figures = "FAIL", {"because": repr(problem)}
            took = time.monotonic() - started
            results.append({"check": name, "result": result, "seconds": round(took, 1), "figures": figures})
            told = ", ".join(f"{key} {value}" for key, value in figures.items())
            print(f"{name:<10} {result:<8} {took:6.1f} s  {told}", flush=True)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    passed, failed, skipped = (sum(one["result"] == result for one in results) for result in ("pass", "FAIL", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
