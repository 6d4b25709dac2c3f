"""The metrics of a fleet of real processes."""

import signal
import urllib.request

from support.databases import on_sqlite
from support.fork_server import Nursery, Shops
from support.processes import environment, eventually, gunicorn

from tests.background.monitoring.test_metrics import Samples


@on_sqlite
def test_any_process_reports_the_fleet_and_its_own_requests_by_name(
    database_url: str, shops: Shops, nursery: Nursery
) -> None:
    [member] = shops.join(PROBE_WORKERS="listener,quick")
    member.wait_for("The listener began")
    member.wait_for("quick: Ran the tick")
    web = gunicorn("-w", "2", "support.traced_app:create_app()")
    env = environment(database_url, WORKERS_ENABLED="false", PROBE_WORKERS="listener,quick")
    with nursery.forked(web, env) as server:
        address = server.wait_for(r"Listening at: (http://\S+)")[1]
        found = [get(f"{address}/metrics")]
        assert found[0].value("background_worker_running", worker="listener") == 1
        assert found[0].value("background_instances") == 1
        assert (found[0].value("background_executions_total", worker="quick", state="succeeded") or 0) >= 1
        assert (found[0].value("background_execution_lateness_seconds_count", worker="quick") or 0) >= 1
        assert 0 <= (found[0].value("background_seconds_since_last_success", worker="quick") or 0) < 30

        def processes() -> set[str]:
            found.append(get(f"{address}/metrics"))
            return {name for each in found for name in each.labels("http_requests_total", "process")}

        assert eventually(lambda: len(processes()) == 2)
        assert not [name for name in processes() if name.endswith(f":{member.pid}")]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def get(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=30) as response:
        return Samples(response.read().decode())
