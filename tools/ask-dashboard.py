#!/usr/bin/env python3
"""Asks Prometheus what a dashboard asks about one job, since the job was created, and prints the last answer of each query.

ask-dashboard.py URL NAMESPACE JOB CREATED DASHBOARD.json
Exit 1 when a query has no data for 30 seconds; those on accelerators may have none.
"""
import datetime
import json
import math
import sys
import time
import urllib.parse
import urllib.request

DEADLINE_SECONDS = 30
STEP_SECONDS = 2

url, namespace, job, created, path = sys.argv[1:]
deadline = time.monotonic() + DEADLINE_SECONDS


def ask(query):
    # Counted back from now: the last point is what holds now.
    end = time.time()
    points = math.ceil((end - datetime.datetime.fromisoformat(created).timestamp()) / STEP_SECONDS)
    parameters = {"query": query, "start": end - points * STEP_SECONDS, "end": end, "step": STEP_SECONDS}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}") as answer:
        return json.load(answer)["data"]["result"]


def last(query, series):
    labels = ",".join(value for name, value in series["metric"].items() if name not in ("namespace", "finetunejob"))
    values = [float(value) for _, value in series["values"]]
    # A rate ends with the run.
    if "rate(" in query and not values[-1] > 0:
        peak = max((value for value in values if math.isfinite(value)), default=0)
        return f"{labels} {peak:.6g} at most".strip()
    return f"{labels} {values[-1]:.6g}".strip()


lacking = []
with open(path, encoding="utf-8") as file:
    panels = json.load(file)["panels"]
for panel in panels:
    for target in panel.get("targets", []):
        query = target["expr"]
        for variable, text in (
            ("$__rate_interval", "1m"),
            ("$__range", "1h"),
            ("$namespace", namespace),
            ("$finetunejob", job),
        ):
            query = query.replace(variable, text)
        needs_accelerator = "finetune_gpu_" in query
        found = ask(query)
        # What the last scrape lacks, the next one may have.
        while not found and not needs_accelerator and time.monotonic() < deadline:
            time.sleep(0.5)
            found = ask(query)
        if found:
            newest = max(series["values"][-1][0] for series in found)
            answer = "; ".join(last(query, series) for series in found if series["values"][-1][0] == newest)
        else:
            answer = "no accelerator here" if needs_accelerator else "NO DATA"
            lacking += [] if needs_accelerator else [panel["title"]]
        print(f"  {panel['title']:<38.38} {answer}")
if lacking:
    sys.exit(f"error: no data for {', '.join(lacking)}")
