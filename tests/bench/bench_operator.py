"""Measures the operator on the real API server of tests/cluster: N FineTuneJobs to their first child, what an idle operator
costs, and a restart.

Usage: bench_operator.py OPERATOR [--jobs N] [--idle-seconds N] [--run-dir DIR]

Prints a table, writes it to tests/bench/results/operator.json and puts it into docs/benchmarks.md; with other than the default
--jobs or --idle-seconds it only prints. Counts and times of requests come from the API server's audit log, CPU and memory from
/proc.

What is real: etcd (without fsync), API server, controller-manager, scheduler, the operator's rights (the chart's roles), Pod
Security. What is not: the kubelet. The profile asks for a resource that no node has, so every pod is made, looked at by the
scheduler, and stays Pending. The operator is a process of its own in the cluster's namespaces, without leader election.
"""

import argparse
import collections
import datetime
import http.client
import json
import os
import pathlib
import queue
import signal
import ssl
import subprocess
import sys
import threading
import time

from machine import processor

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "tests/cluster/cluster"
CHART = REPOSITORY / "charts/finetune-operator"
CRD = REPOSITORY / "crds/finetunejobs.yaml"
RESULT = REPOSITORY / "tests/bench/results/operator.json"
PAGE = REPOSITORY / "docs/benchmarks.md"
MARKS = ("<!-- operator results -->", "<!-- end of operator results -->")

JOBS, IDLE_SECONDS = 2000, 300
EXTRAPOLATED_JOBS = 10_000
API_SERVER = ("10.99.0.1", 16443)
LISTEN = "127.0.0.1:8090"
SYSTEM, NAMESPACE = "finetune-system", "bench"
ACCOUNT = "finetune-operator"
USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
WRITES = ("create", "update", "patch", "delete", "deletecollection")
CLIENTS = 8
# The operator waits 20 s for a pod before it says that a Job has none: quiet is longer than that.
QUIET_SECONDS = 30
DEADLINE_SECONDS = 1800
NOBODY_HAS = "example.com/nobody-has-this"
PROFILES = {"default": {
    "image": "example.com/finetune-trainer:bench",
    "cpuResources": {"limits": {NOBODY_HAS: "1"}},
    "storage": {"size": "1Gi"},
}}
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def say(text):
    print(f"==> {text}", file=sys.stderr, flush=True)


# ---- inside the cluster's namespaces


def kubectl(*arguments, given=None):
    done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def install(run_dir):
    """CRD, namespaces, and the operator's account with the rights that the chart gives it; returns its kubeconfig."""
    kubectl("apply", "--server-side", "-f", str(CRD))
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/finetunejobs.finetune.dev")
    for name in (SYSTEM, NAMESPACE):
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}
        kubectl("apply", "--server-side", "-f", "-", given=json.dumps(namespace))
    shown = subprocess.run(
        ["helm", "template", "finetune", str(CHART), "--namespace", SYSTEM, "--set", f"serviceAccount.name={ACCOUNT}",
         "--set-json", f"profiles={json.dumps(PROFILES)}",
         "--show-only", "templates/serviceaccount.yaml", "--show-only", "templates/rbac.yaml"],
        capture_output=True, text=True)
    if shown.returncode != 0:
        sys.exit(f"error: helm template: {shown.stderr.strip()}")
    kubectl("apply", "--server-side", "--namespace", SYSTEM, "-f", "-", given=shown.stdout)
    config = json.loads(kubectl("config", "view", "--raw", "-o", "json"))
    token = kubectl("create", "token", ACCOUNT, "--namespace", SYSTEM, "--duration=24h")
    config["users"] = [{"name": "admin", "user": {"token": token}}]
    path = run_dir / "operator.kubeconfig"
    path.write_text(json.dumps(config))
    return path


def connect(run_dir):
    context = ssl.create_default_context(cafile=run_dir / "pki/ca.crt")
    context.load_cert_chain(run_dir / "pki/admin.crt", run_dir / "pki/admin.key")
    return http.client.HTTPSConnection(*API_SERVER, context=context, timeout=60)


def ask(connection, method, path, body=None):
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {text.decode(errors='replace')[:500]}")
    return json.loads(text)


JOBS_PATH = f"/apis/finetune.dev/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"


def finetunejob(number):
    return json.dumps({
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": f"bench-{number:05}"},
        "spec": {
            "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
            "dataset": {"train": {"uri": "hf://datasets/acme/support/train.jsonl"}},
            "method": {"type": "LoRA"},
        },
    })


def create_jobs(run_dir, count):
    """Creates them with parallel requests, each client on a connection of its own."""
    numbers, failures = queue.SimpleQueue(), []
    for number in range(count):
        numbers.put(number)

    def client():
        try:
            connection = connect(run_dir)
            while True:
                ask(connection, "POST", JOBS_PATH, finetunejob(numbers.get_nowait()))
        except queue.Empty:
            connection.close()
        except Exception as error:  # told by the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        sys.exit(f"error: a FineTuneJob could not be created: {failures[0]}")


def seconds(text):
    return datetime.datetime.fromisoformat(text).timestamp()


class Audit:
    """The API server's log of requests, read as it grows. It is written before the answer goes out."""

    def __init__(self, run_dir):
        self.file = open(run_dir / "audit.log", "rb")
        self.rest = b""
        self.operator = []  # (answered at, verb, resource, code)
        self.created = []  # (asked at, answered at) of every FineTuneJob

    def read(self):
        self.rest += self.file.read()
        *lines, self.rest = self.rest.split(b"\n")
        for line in lines:
            is_operator = USER.encode() in line
            if not is_operator and b'"resource":"finetunejobs"' not in line:
                continue
            event = json.loads(line)
            target = event.get("objectRef", {})
            resource = "/".join(filter(None, [target.get("resource"), target.get("subresource")])) or event["requestURI"]
            asked, answered = seconds(event["requestReceivedTimestamp"]), seconds(event["stageTimestamp"])
            code = event.get("responseStatus", {}).get("code", 0)
            if event["user"]["username"] == USER:
                self.operator.append((answered, event["verb"], resource, code))
            elif event["verb"] == "create" and resource == "finetunejobs" and code == 201:
                self.created.append((asked, answered))
        return self

    def children(self):
        return [at for at, verb, resource, code in self.operator if (verb, resource, code) == ("create", "jobs", 201)]

    def requests(self, since, until):
        """By verb and resource; refused ones apart."""
        counts = collections.Counter()
        for at, verb, resource, code in self.operator:
            if since <= at < until:
                counts[f"{verb} {resource}" + (f" ({code})" if code >= 300 else "")] += 1
        return dict(counts.most_common())

    def writes(self, since, until):
        return sum(1 for at, verb, _, _ in self.operator if since <= at < until and verb in WRITES)


class Operator:
    """The process, and what /proc and its own /metrics say of it."""

    def __init__(self, program, kubeconfig, run_dir, log):
        profiles = run_dir / "profiles.yaml"
        profiles.write_text(json.dumps(PROFILES))  # JSON is YAML
        self.log = run_dir / "log" / log
        self.process = subprocess.Popen(
            [program, "--profiles", profiles, "--leader-election", "false", "--listen", LISTEN],
            env={**os.environ, "KUBECONFIG": str(kubeconfig)}, stdin=subprocess.DEVNULL, stdout=self.log.open("w"),
            stderr=subprocess.STDOUT)
        self.started = time.time()

    def check(self):
        if self.process.poll() is not None:
            sys.exit(f"error: the operator ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")

    def cpu_seconds(self):
        self.check()
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """Bytes resident now and at most."""
        self.check()
        lines = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return {"nowBytes": int(lines["VmRSS"].split()[0]) * 1024, "peakBytes": int(lines["VmHWM"].split()[0]) * 1024}

    def get(self, path):
        self.check()
        connection = http.client.HTTPConnection(LISTEN, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except ConnectionError:
            return 0, ""  # it does not listen yet
        finally:
            connection.close()

    def wait_ready(self):
        wait_for("the operator", 60, 0.1, lambda: self.get("/readyz")[0] == 200)

    def passes(self):
        prefix = "finetune_operator_reconcile_total{"
        lines = self.get("/metrics")[1].splitlines()
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(prefix)))

    def end(self):
        self.process.terminate()
        self.process.wait(timeout=60)


def wait_for(what, deadline_seconds, every_seconds, condition):
    deadline = time.time() + deadline_seconds
    while not condition():
        if time.time() > deadline:
            sys.exit(f"error: {what}: not within {deadline_seconds} s")
        time.sleep(every_seconds)


def count_unschedulable(run_dir):
    connection = connect(run_dir)
    jobs = ask(connection, "GET", JOBS_PATH)["items"]
    connection.close()
    return sum(any(condition["type"] == "Running" and condition["reason"] == "Unschedulable"
                   for condition in job.get("status", {}).get("conditions", [])) for job in jobs)


def measure(program, run_dir, count, idle_seconds):
    kubeconfig = install(run_dir)
    audit = Audit(run_dir)
    operator = Operator(program, kubeconfig, run_dir, "operator.log")
    operator.wait_ready()
    empty = operator.memory()

    say(f"{count} FineTuneJobs")
    cpu_before = operator.cpu_seconds()
    create_jobs(run_dir, count)
    say("their first children")
    wait_for("the first child of every job", DEADLINE_SECONDS, 0.5, lambda: len(audit.read().children()) >= count)
    first, created = min(asked for asked, _ in audit.created), max(answered for _, answered in audit.created)
    last_child = sorted(audit.children())[count - 1]
    say(f"{count} children {last_child - first:.1f} s after the first creation; waiting until the operator is quiet")

    def is_quiet():
        audit.read()
        last_write = max(at for at, verb, _, _ in audit.operator if verb in WRITES)
        return time.time() - last_write > QUIET_SECONDS and count_unschedulable(run_dir) == count

    wait_for("a quiet operator", DEADLINE_SECONDS, 5, is_quiet)
    quiet = max(at for at, verb, _, _ in audit.operator if verb in WRITES)
    busy_cpu = operator.cpu_seconds() - cpu_before
    resident = operator.memory()
    requests = audit.requests(first, time.time())

    cpu_before = operator.cpu_seconds()
    passes_before, page = operator.passes(), operator.get("/metrics")[1]
    scrape_cpu = (operator.cpu_seconds() - cpu_before) / 2
    scraped = operator.memory()
    say(f"quiet {quiet - first:.0f} s after the first creation; idle for {idle_seconds} s")
    idle_since, cpu_before = time.time(), operator.cpu_seconds()
    time.sleep(idle_seconds)  # the measurement itself: nothing is awaited
    idle_cpu, idle_until = operator.cpu_seconds() - cpu_before, time.time()
    idle_passes = operator.passes() - passes_before
    audit.read()
    idle = {"seconds": idle_until - idle_since, "writes": audit.writes(idle_since, idle_until), "passes": idle_passes,
            "cpuSeconds": idle_cpu, "requests": audit.requests(idle_since, idle_until)}

    say("restart")
    operator.end()
    operator = Operator(program, kubeconfig, run_dir, "operator-restarted.log")
    operator.wait_ready()
    # A scrape with thousands of jobs takes its time: the answer is as fine as the questions are far apart.
    wait_for("a pass over every job", 600, 0.5, lambda: operator.passes() >= count)
    seen = time.time()
    wait_for("what a restart writes", 2 * QUIET_SECONDS, 1, lambda: time.time() - operator.started > QUIET_SECONDS)
    audit.read()
    restart = {"secondsToPassOverAll": seen - operator.started, "watchedSeconds": time.time() - operator.started,
               "writes": audit.writes(operator.started, time.time()), "peakBytes": operator.memory()["peakBytes"],
               "requests": audit.requests(operator.started, time.time())}
    operator.end()
    per_job = (resident["nowBytes"] - empty["nowBytes"]) / count
    return {
        "firstChild": {"seconds": last_child - first, "jobsPerSecond": count / (last_child - first),
                       "creationSeconds": created - first},
        "toQuiet": {"seconds": quiet - first, "cpuSeconds": busy_cpu, "requests": requests,
                    "writesPerJob": sum(n for name, n in requests.items() if name.split()[0] in WRITES) / count},
        "idle": idle,
        "memory": {"emptyBytes": empty["nowBytes"], "residentBytes": resident["nowBytes"], "peakBytes": resident["peakBytes"],
                   "bytesPerJob": per_job, "extrapolatedJobs": EXTRAPOLATED_JOBS,
                   "extrapolatedBytes": empty["nowBytes"] + per_job * EXTRAPOLATED_JOBS},
        "scrape": {"bytes": len(page), "cpuSeconds": scrape_cpu, "peakBytesAfter": scraped["peakBytes"],
                   "residentBytesAfter": scraped["nowBytes"]},
        "restart": restart,
    }


# ---- outside


def in_cluster(arguments):
    """Runs `measure` inside a cluster that ends with this process, however it ends: `hold` waits on our pipe."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by a signal"))
    # In sessions of their own: Ctrl-C is ours alone, and the cluster is ended in order.
    hold = subprocess.Popen([CLUSTER, "hold", arguments.run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            start_new_session=True)
    try:
        if hold.stdout.readline().strip() != "ready":
            sys.exit(hold.wait())  # it said why
        load = os.getloadavg()
        command = [CLUSTER, "enter", arguments.run_dir, sys.executable, __file__, "--inside", arguments.operator,
                   "--jobs", str(arguments.jobs), "--idle-seconds", str(arguments.idle_seconds), "--run-dir", arguments.run_dir]
        inside = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True)
        output, _ = inside.communicate()
        if inside.returncode != 0:
            sys.exit(f"error: nothing was measured; logs in {arguments.run_dir}/log")
        versions = subprocess.run([CLUSTER, "enter", arguments.run_dir, "kubectl", "version", "-o", "json"], check=True,
                                  capture_output=True, text=True)
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    finally:
        hold.stdin.close()
        hold.wait()
    return {
        "workload": f"{arguments.jobs} FineTuneJobs in one namespace, {CLIENTS} clients that create them",
        "jobs": arguments.jobs, "cores": os.cpu_count(), "processor": processor(), "loadAverageBefore": load,
        "kubernetes": json.loads(versions.stdout)["serverVersion"]["gitVersion"],
        "apiServer": "real, with controller-manager and scheduler on the same machine; etcd without fsync",
        "kubelet": f"faked: pods ask for {NOBODY_HAS}, which no node has, and stay Pending",
        **json.loads(output),
    }


def mebibytes(count):
    return f"{count / 2**20:.0f} MiB"


def rows(result):
    """What is printed and what stands in the documentation: (measure, figure, aim)."""
    jobs, first, quiet = result["jobs"], result["firstChild"], result["toQuiet"]
    idle, memory, scrape, restart = result["idle"], result["memory"], result["scrape"], result["restart"]
    return [
        (f"{jobs:,} jobs to the first child of each",
         f"{first['jobsPerSecond']:.0f}/s ({first['seconds']:.1f} s; creating the jobs took {first['creationSeconds']:.1f} s of it)", "45/s"),
        ("CPU of the operator until all pods are known unschedulable",
         f"{1000 * quiet['cpuSeconds'] / jobs:.1f} ms a job; {quiet['writesPerJob']:.1f} writes a job", ""),
        (f"writes in {idle['seconds']:.0f} idle seconds", f"{idle['writes']}", "0"),
        ("idle CPU", f"{100 * idle['cpuSeconds'] / idle['seconds']:.2f} % of a core ({idle['cpuSeconds']:.2f} s); "
                     f"{60 * idle['passes'] / jobs / idle['seconds']:.2f} passes a job and minute", "0.5 %, 0.2 passes at 10,000"),
        (f"resident memory, {jobs:,} jobs with Job and pod",
         f"{mebibytes(memory['residentBytes'])} (peak {mebibytes(memory['peakBytes'])}; {mebibytes(memory['emptyBytes'])} without jobs)", ""),
        (f"the same for {memory['extrapolatedJobs']:,} jobs: extrapolated, not measured",
         f"{mebibytes(memory['extrapolatedBytes'])} ({memory['bytesPerJob'] / 1024:.1f} KiB a job)", "64 MiB"),
        ("one scrape of /metrics", f"{scrape['bytes'] / 2**20:.1f} MiB, {1000 * scrape['cpuSeconds']:.0f} ms of CPU; "
                                   f"resident memory after it {mebibytes(scrape['residentBytesAfter'])}", ""),
        (f"restart with {jobs:,} jobs: a pass over all",
         f"{restart['secondsToPassOverAll']:.1f} s, {restart['writes']} writes, peak {mebibytes(restart['peakBytes'])}", "10 s at 10,000, 0 writes"),
    ]


def print_table(result):
    print(f"\n{result['workload']}; kubelet {result['kubelet']}; API server {result['apiServer']}")
    width = max(len(measure) for measure, _, _ in rows(result))
    for name, figure, aim in rows(result):
        print(f"{name:{width}}  {figure}" + (f"  [aim {aim}]" if aim else ""))
    for name, key in (("until quiet", "toQuiet"), ("idle", "idle"), ("restart", "restart")):
        print(f"requests of the operator, {name}: " + ", ".join(f"{count} {what}" for what, count in result[key]["requests"].items()))


def write_page(result):
    lines = ["| measure | reached | aim |", "|---|---|---|"] + [f"| {' | '.join(row)} |" for row in rows(result)]
    machine = (f"Measured on {result['cores']} cores of an {result['processor']} that also ran Kubernetes {result['kubernetes']} and the "
               f"client; load average before {result['loadAverageBefore'][0]:.1f}. API server {result['apiServer']}. "
               f"Kubelet {result['kubelet']}.")
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + "\n" + "\n".join(lines) + f"\n\n{machine}\n{MARKS[1]}" + after)


def main():
    cache = os.environ.get("FINETUNE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "finetune-operator")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", type=os.path.abspath, help="the program finetune-operator")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--idle-seconds", type=int, default=IDLE_SECONDS)
    parser.add_argument("--run-dir", type=os.path.abspath, default=os.path.join(cache, "run/bench-operator"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        result = measure(arguments.operator, pathlib.Path(arguments.run_dir), arguments.jobs, arguments.idle_seconds)
        print(json.dumps(result))
        return
    result = in_cluster(arguments)
    print_table(result)
    if (arguments.jobs, arguments.idle_seconds) == (JOBS, IDLE_SECONDS):
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        write_page(result)
    else:
        say("not written: the figures of record have the default --jobs and --idle-seconds")


if __name__ == "__main__":
    main()
