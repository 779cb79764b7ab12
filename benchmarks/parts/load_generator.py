"""Load of a search server: so many clients at once, each asking as soon as it is answered; run as a process.

python benchmarks/parts/load_generator.py REQUEST     (JSON: url, bodies, clients, seconds) → JSON on stdout
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp


async def run_clients(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, percentiles in milliseconds and failures of `clients` clients over `seconds`."""
    durations: list[float] = []
    failures = 0
    asked = 0
    end = time.perf_counter() + seconds

    async def ask(session: aiohttp.ClientSession) -> None:
        nonlocal failures, asked
        while time.perf_counter() < end:
            body = bodies[asked % len(bodies)]
            asked += 1
            began = time.perf_counter()
            async with session.post(url, json=body) as response:
                await response.read()
                failures += response.status != 200
            durations.append(1000 * (time.perf_counter() - began))

    began = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        await asyncio.gather(*(ask(session) for _ in range(clients)))
    elapsed = time.perf_counter() - began
    ordered = sorted(durations)
    return {
        "qps": len(ordered) / elapsed,
        "p50": ordered[len(ordered) // 2],
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "requests": len(ordered),
        "failures": failures,
    }


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    print(json.dumps(asyncio.run(run_clients(**request))))
