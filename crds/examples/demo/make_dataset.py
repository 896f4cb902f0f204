"""Writes the demo's rows: plain English to one kubectl command line.

Usage: make_dataset.py FOLDER   (writes train.jsonl and test.jsonl; the same bytes on every run)

Phrasings and names of the test rows occur in no training row: what is measured is whether the task was learnt, not
whether its rows were. Each intent has phrasings for training and others, held out, that a colleague might use instead.
"""

import json
import pathlib
import random
import sys

SYSTEM = "Answer with one kubectl command line and nothing else."
TRAIN_ROWS, TEST_ROWS, SEED = 1000, 150, 7

TRAIN_NAMES = {
    "app": ["web", "api", "cart", "billing", "search", "gateway", "auth", "orders", "mailer", "reports", "frontend", "worker",
            "scheduler", "inventory", "payments", "profile", "catalog", "checkout", "notifier", "importer"],
    "ns": ["prod", "staging", "dev", "qa", "shop", "finance", "platform", "tools", "team-red", "team-blue", "default", "edge"],
    "node": ["node-1", "node-2", "node-7", "worker-3", "worker-12", "gpu-1", "gpu-4", "pool-a-2"],
    "file": ["deploy.yaml", "service.yaml", "job.yaml", "config.yaml", "k8s/app.yaml", "base/ingress.yaml"],
    "image": ["nginx:1.25", "redis:7", "myorg/app:v2", "myorg/app:v3.1", "postgres:16", "registry.local/tool:9"],
    "count": ["2", "3", "4", "5", "6", "8", "10", "1"],
    "port": ["8080", "3000", "9090", "5432", "6379", "443"],
    "command": ["ls", "date", "env", "ps", "df", "whoami"],
    "lines": ["20", "50", "100", "200"],
}
TEST_NAMES = {
    "app": ["ledger", "quotes", "stream", "uploader", "archive", "tracker", "wiki", "chat", "pricing", "router"],
    "ns": ["canary", "sandbox", "ops", "retail", "team-green", "labs"],
    "node": ["node-9", "worker-21", "gpu-8", "pool-b-5"],
    "file": ["stack.yaml", "cron.yaml", "k8s/db.yaml"],
    "image": ["httpd:2.4", "myorg/app:v4", "mysql:8"],
    "count": ["7", "9", "12"],
    "port": ["8443", "5000", "9200"],
    "command": ["pwd", "id", "uptime"],
    "lines": ["30", "80", "500"],
}

# command template, phrasings for training, phrasings held out
INTENTS = [
    ("kubectl get pods -n {ns}",
     ["list the pods in {ns}", "show me all pods in namespace {ns}", "which pods are running in {ns}?", "get pods from {ns}",
      "what pods do we have in {ns}", "display the pods of the {ns} namespace", "pods in {ns} please", "I need a list of pods in {ns}",
      "show pods for namespace {ns}", "give me every pod in {ns}", "let me see the pods in {ns}", "print the pods living in {ns}"],
     ["can you list all pods in the {ns} namespace?", "show the pods that are in {ns}", "I want to see the pods in {ns}"]),
    ("kubectl get services -n {ns}",
     ["list the services in {ns}", "show me all services in namespace {ns}", "which services exist in {ns}?", "get services from {ns}",
      "what services do we have in {ns}", "display the services of the {ns} namespace", "services in {ns} please",
      "show services for namespace {ns}", "give me every service in {ns}", "let me see the services in {ns}"],
     ["can you list all services in the {ns} namespace?", "show the services that are in {ns}", "I want to see the services in {ns}"]),
    ("kubectl get deployments -n {ns}",
     ["list the deployments in {ns}", "show me all deployments in namespace {ns}", "which deployments exist in {ns}?",
      "get deployments from {ns}", "what deployments do we have in {ns}", "display the deployments of the {ns} namespace",
      "deployments in {ns} please", "show deployments for namespace {ns}", "give me every deployment in {ns}",
      "let me see the deployments in {ns}"],
     ["can you list all deployments in the {ns} namespace?", "show the deployments that are in {ns}",
      "I want to see the deployments in {ns}"]),
    ("kubectl scale deployment {app} --replicas={count} -n {ns}",
     ["scale {app} to {count} replicas in {ns}", "set the replicas of {app} in {ns} to {count}", "run {count} copies of {app} in {ns}",
      "scale deployment {app} in namespace {ns} to {count}", "I want {count} replicas of {app} in {ns}",
      "make {app} in {ns} have {count} replicas", "change {app} to {count} replicas in {ns}", "{app} in {ns} should have {count} pods",
      "resize {app} to {count} instances in {ns}", "bring {app} to {count} replicas in namespace {ns}",
      "we need {count} instances of {app} in {ns}"],
     ["please scale {app} in {ns} to {count} instances", "have {count} replicas of {app} running in {ns}",
      "adjust {app} in namespace {ns} to {count} copies"]),
    ("kubectl rollout restart deployment {app} -n {ns}",
     ["restart {app} in {ns}", "restart the deployment {app} in namespace {ns}", "do a rolling restart of {app} in {ns}",
      "roll {app} in {ns}", "bounce {app} in {ns}", "restart all pods of {app} in {ns}", "give {app} in {ns} a fresh start",
      "trigger a restart of {app} in {ns}", "reboot {app} in {ns}", "cycle the pods of deployment {app} in {ns}",
      "please restart {app} in namespace {ns}"],
     ["can you restart the {app} deployment in {ns}?", "I need {app} restarted in {ns}", "perform a rolling restart of deployment {app} in {ns}"]),
    ("kubectl rollout undo deployment {app} -n {ns}",
     ["undo the last rollout of {app} in {ns}", "roll back {app} in {ns}", "revert deployment {app} in namespace {ns}",
      "go back to the previous version of {app} in {ns}", "rollback {app} in {ns} to the version before",
      "restore the previous release of {app} in {ns}", "the last release of {app} in {ns} was bad, undo it",
      "take {app} in {ns} back one version", "undo the deployment of {app} in {ns}", "revert {app} in {ns} to the last release"],
     ["please roll back the deployment {app} in {ns}", "return {app} in {ns} to its previous version",
      "undo the latest release of {app} in namespace {ns}"]),
    ("kubectl rollout status deployment {app} -n {ns}",
     ["is the rollout of {app} in {ns} done?", "show the rollout status of {app} in {ns}", "check the rollout of {app} in {ns}",
      "how is the rollout of {app} going in {ns}", "rollout status for {app} in namespace {ns}", "watch the rollout of {app} in {ns}",
      "has {app} finished rolling out in {ns}?", "status of the {app} rollout in {ns}", "follow the rollout of deployment {app} in {ns}"],
     ["what is the rollout status of {app} in {ns}?", "did the rollout of {app} in {ns} finish?",
      "check how the {app} rollout is doing in {ns}"]),
    ("kubectl logs deployment/{app} --tail={lines} -n {ns}",
     ["show the last {lines} log lines of {app} in {ns}", "logs of {app} in {ns}, last {lines} lines",
      "tail {lines} lines of the {app} logs in {ns}", "give me {lines} lines of logs from {app} in {ns}",
      "print the last {lines} lines that {app} logged in {ns}", "the latest {lines} log lines of {app} in namespace {ns}",
      "what did {app} log in {ns}? last {lines} lines", "fetch the final {lines} lines of the {app} log in {ns}",
      "read the newest {lines} log lines from {app} in {ns}"],
     ["I'd like the last {lines} lines of logs of {app} in {ns}", "show me {lines} log lines from {app} in namespace {ns}",
      "get the latest {lines} lines of the log of {app} in {ns}"]),
    ("kubectl logs -f deployment/{app} -n {ns}",
     ["follow the logs of {app} in {ns}", "stream the logs of {app} in {ns}", "live logs from {app} in {ns}",
      "keep printing the logs of {app} in {ns}", "watch the log of {app} in namespace {ns}", "tail the logs of {app} in {ns} live",
      "show me the logs of {app} in {ns} as they come", "follow what {app} writes in {ns}", "stream what {app} logs in {ns}"],
     ["please follow the {app} logs in {ns}", "stream the live logs of {app} in namespace {ns}", "watch the logs of {app} in {ns} live"]),
    ("kubectl describe deployment {app} -n {ns}",
     ["describe {app} in {ns}", "describe the deployment {app} in namespace {ns}", "show the details of {app} in {ns}",
      "give me details about deployment {app} in {ns}", "what does {app} in {ns} look like in detail?",
      "tell me everything about {app} in {ns}", "full description of {app} in {ns}", "details for {app} in namespace {ns}",
      "print a description of deployment {app} in {ns}"],
     ["please describe the {app} deployment in {ns}", "I want details of the deployment {app} in {ns}",
      "show a full description of {app} in namespace {ns}"]),
    ("kubectl delete deployment {app} -n {ns}",
     ["delete {app} in {ns}", "remove the deployment {app} from {ns}", "delete the deployment {app} in namespace {ns}",
      "get rid of {app} in {ns}", "take down {app} in {ns}", "drop deployment {app} from {ns}", "remove {app} from namespace {ns}",
      "destroy the deployment {app} in {ns}", "we no longer need {app} in {ns}, delete it"],
     ["please delete the {app} deployment in {ns}", "I want deployment {app} removed from {ns}", "delete {app} from namespace {ns}"]),
    ("kubectl set image deployment/{app} {app}={image} -n {ns}",
     ["set the image of {app} in {ns} to {image}", "update {app} in {ns} to {image}", "use image {image} for {app} in {ns}",
      "change the image of deployment {app} in {ns} to {image}", "deploy {image} as {app} in {ns}", "upgrade {app} in {ns} to {image}",
      "switch {app} in namespace {ns} to image {image}", "put {image} on {app} in {ns}", "roll out {image} for {app} in {ns}"],
     ["please set {app} in {ns} to the image {image}", "change {app} in {ns} to use {image}", "update the image of {app} in namespace {ns} to {image}"]),
    ("kubectl port-forward service/{app} {port}:{port} -n {ns}",
     ["forward port {port} of {app} in {ns}", "port-forward {app} in {ns} on {port}", "make {app} in {ns} reachable on local port {port}",
      "forward {port} to the service {app} in {ns}", "open port {port} to {app} in namespace {ns}",
      "tunnel port {port} to service {app} in {ns}", "let me reach {app} in {ns} on port {port}",
      "forward local port {port} to {app} in {ns}", "set up a port forward on {port} for {app} in {ns}"],
     ["please forward port {port} to {app} in {ns}", "I need a port forward to {app} in {ns} on {port}",
      "open a tunnel on port {port} to {app} in {ns}"]),
    ("kubectl exec deployment/{app} -n {ns} -- {command}",
     ["run {command} in {app} in {ns}", "execute {command} inside {app} in namespace {ns}", "exec {command} in {app} in {ns}",
      "run the command {command} in a pod of {app} in {ns}", "inside {app} in {ns}, run {command}", "call {command} within {app} in {ns}",
      "what does {command} say in {app} in {ns}?", "start {command} in the container of {app} in {ns}",
      "give me the output of {command} in {app} in {ns}"],
     ["please execute {command} in {app} in {ns}", "run the {command} command inside {app} in {ns}",
      "I want to run {command} in {app} in namespace {ns}"]),
    ("kubectl cordon {node}",
     ["cordon {node}", "mark {node} as unschedulable", "no new pods on {node}", "stop scheduling on {node}",
      "keep new pods off {node}", "make {node} unschedulable", "close {node} for new pods", "block scheduling on {node}",
      "{node} should not get new pods", "disable scheduling on {node}"],
     ["please cordon the node {node}", "do not schedule new pods on {node}", "set {node} to unschedulable"]),
    ("kubectl uncordon {node}",
     ["uncordon {node}", "mark {node} as schedulable", "allow new pods on {node} again", "resume scheduling on {node}",
      "let pods onto {node} again", "make {node} schedulable again", "open {node} for new pods", "enable scheduling on {node}",
      "{node} may get new pods again", "turn scheduling on {node} back on"],
     ["please uncordon the node {node}", "schedule new pods on {node} again", "set {node} to schedulable again"]),
    ("kubectl drain {node} --ignore-daemonsets",
     ["drain {node}", "evict everything from {node}", "empty {node} for maintenance", "move all pods off {node}", "clear {node} of pods",
      "drain the node {node}", "get all workloads off {node}", "prepare {node} for maintenance", "vacate {node}",
      "take the pods away from {node}"],
     ["please drain node {node} now", "evict all the pods from {node}", "move every pod away from {node}"]),
    ("kubectl apply -f {file} -n {ns}",
     ["apply {file} in {ns}", "apply the file {file} to namespace {ns}", "create what is in {file} in {ns}", "deploy {file} to {ns}",
      "install {file} in {ns}", "roll out the manifest {file} in {ns}", "use {file} in namespace {ns}", "put {file} into {ns}",
      "submit {file} to {ns}", "apply manifest {file} to {ns}"],
     ["please apply the manifest {file} in {ns}", "I want {file} applied to {ns}", "apply what is in {file} to namespace {ns}"]),
    ("kubectl top pods -n {ns}",
     ["how much cpu and memory do the pods in {ns} use?", "show the resource usage of pods in {ns}", "top pods in {ns}",
      "cpu usage of the pods in {ns}", "memory usage of pods in namespace {ns}", "which pods in {ns} use most memory?",
      "usage of the pods in {ns}", "show cpu and memory of pods in {ns}", "metrics for the pods in {ns}"],
     ["what is the resource usage of the pods in {ns}?", "show me cpu and memory usage for pods in {ns}",
      "how much memory do pods in namespace {ns} use?"]),
    ("kubectl create namespace {ns}",
     ["create the namespace {ns}", "make a namespace called {ns}", "new namespace {ns}", "add a namespace named {ns}",
      "set up namespace {ns}", "I need a namespace {ns}", "create a new namespace with the name {ns}", "namespace {ns} does not exist, create it",
      "start a namespace {ns}"],
     ["please create a namespace called {ns}", "make the new namespace {ns}", "add the namespace {ns}"]),
]


def fill(template, names, rng):
    return {key: rng.choice(values) for key, values in names.items() if "{" + key + "}" in template}


def row(request, command):
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request},
                         {"role": "assistant", "content": command}]}


def make(count, names, phrasings_of, rng):
    rows, seen = [], set()
    while len(rows) < count:
        intent = INTENTS[len(rows) % len(INTENTS)]
        command = intent[0]
        phrasing = rng.choice(phrasings_of(intent))
        values = fill(command, names, rng)
        request = phrasing.format(**values)
        # Short intents run out of combinations: a repeated one is replaced by one of a longer intent.
        attempts = 0
        while request in seen:
            attempts += 1
            if attempts > 50:
                command = INTENTS[rng.randrange(len(INTENTS))][0]
                intent = next(candidate for candidate in INTENTS if candidate[0] == command)
            phrasing = rng.choice(phrasings_of(intent))
            values = fill(command, names, rng)
            request = phrasing.format(**values)
        seen.add(request)
        rows.append(row(request, command.format(**values)))
    rng.shuffle(rows)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))


def main():
    folder = pathlib.Path(sys.argv[1])
    for intent in INTENTS:
        assert not set(intent[1]) & set(intent[2]), f"phrasings of {intent[0]} overlap"
    for key, values in TRAIN_NAMES.items():
        assert not set(values) & set(TEST_NAMES[key]), f"names of {key} overlap"
    write(folder / "train.jsonl", make(TRAIN_ROWS, TRAIN_NAMES, lambda intent: intent[1], random.Random(SEED)))
    write(folder / "test.jsonl", make(TEST_ROWS, TEST_NAMES, lambda intent: intent[2], random.Random(SEED + 1)))


if __name__ == "__main__":
    main()
