"""Claims about several servers behind one reward: real servers, of which some die, hang or are missing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest
from helpers import ROOT, wait_until
from test_rewards_remote import OWN, Peer, one_line

from config import ConfigError, parse_config, validate
from engines import servers
from rewards import RewardError, Unanswered, build_rewards, check_reward_weights


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(name="own:identity", port=0)`: the real command; (process, URL), once it listens."""
    directory, processes = tmp_path_factory.mktemp("own"), []
    (directory / "own.py").write_text(OWN)

    def start(name="own:identity", port=0):
        command = [sys.executable, ROOT / "rewards.py", "serve", name, "--port", str(port), "--batch", "4"]
        process = subprocess.Popen(command, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(process)
        return process, re.search(r"http://\S+:\d+", process.stdout.readline())[0]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def reward_of(urls, name="own:identity", **options):
    return build_rewards({name: 1.0}, urls={name: urls}, batch=4, **options)


def score(reward, count):
    """Score pictures that encode their numbers, and assert that no score is lost or swapped."""
    numbers = np.arange(count)
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[:, 0, 0] = np.stack([np.full(count, 3), numbers // 256, numbers % 256], 1)
    columns = reward(images, [str(2 * i) for i in numbers], [{"number": int(3 * i)} for i in numbers])
    assert columns["own:identity"].tolist() == (3 * 65536 + numbers).tolist()
    assert columns["own:identity/prompt"].tolist() == (2 * numbers).tolist()
    assert columns["own:identity/metadata"].tolist() == (3 * numbers).tolist()


def scored(url):
    return httpx2.get(f"{url}/health").json()["scored"]


def nobody():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_no_score_is_lost_or_swapped_when_one_of_three_is_killed_in_the_middle(start, capfd):
    running = [start() for _ in range(3)]
    reward = reward_of([url for _, url in running])
    process, url = running[1]

    def kill():
        wait_until(lambda: scored(url) > 100, 60)
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    score(reward, 3000)
    killer.join()
    assert process.wait(10) == -signal.SIGKILL
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ") and url in line and "is gone" in line

    start(port=int(url.rpartition(":")[2]))                 # it is asked again once it is back
    wait_until(lambda: "is back" in capfd.readouterr().err, 60)
    score(reward, 60)
    assert scored(url) > 0


def test_a_server_that_hangs_is_named_and_the_others_compute_its_part(start, capfd, monkeypatch):
    monkeypatch.setattr(servers, "SLOW", 1.0)
    (process, url), (_, other) = start(), start()
    reward = reward_of([url, other])
    score(reward, 8)
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    score(reward, 40)
    assert 1 < time.monotonic() - started < 60              # far below half of the deadline
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ") and url in line and "is slow" in line
    process.send_signal(signal.SIGCONT)


def test_a_server_that_is_dead_from_the_start_is_a_warning_line(start, capfd):
    dead, (_, url) = nobody(), start()
    score(reward_of([dead, url]), 20)
    # A late request of another test may be told of too.
    (line,) = [line for line in capfd.readouterr().err.splitlines() if dead in line]
    assert line.startswith("warning: ") and "refused" in line


def test_a_server_that_is_silent_from_the_start_does_not_hold_up_the_others(start, capfd, monkeypatch):
    monkeypatch.setattr(servers, "SLOW", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reward, started = reward_of([url, start()[1]]), time.monotonic()
        score(reward, 20)
        assert time.monotonic() - started < 100             # far below half of the deadline
    (line,) = [line for line in capfd.readouterr().err.splitlines() if url in line and "is gone" not in line]
    assert line.startswith("warning: ") and "has not answered" in line


def test_a_busy_server_is_not_asked_before_its_retry_after():
    asked = []

    def busy(number, body):
        asked.append(time.monotonic())
        return (200, b'{"scores": [1], "metrics": {}}') if number > 1 else (503, b"busy", ("Retry-After", "3"))

    with Peer(busy) as peer:
        build_rewards({"any": 1.0}, urls={"any": [f"http://{peer.address}", nobody()]})(*part(1))
    assert len(asked) == 2 and asked[1] - asked[0] >= 3


def test_servers_that_are_all_dead_end_in_one_line():
    with pytest.raises(RewardError) as error:
        score(reward_of([nobody(), nobody()], deadline=1), 4)
    assert one_line(error, "none of the 2 servers of reward 'own:identity'", "in 1 s", "refused", "rewards.py serve")


def test_a_server_of_another_reward_is_refused_at_the_first_call(start):
    (_, url), (_, other) = start(), start("own:slow")
    with pytest.raises(RewardError) as error:
        score(reward_of([url, other]), 1)
    assert one_line(error, f"{other} serves the reward 'own:slow', not 'own:identity'")


def test_the_faster_server_gets_more_requests():
    def answer(seconds):
        def respond(number, body):
            time.sleep(seconds)
            return 200, json.dumps({"scores": [float(p) for p in json.loads(body)["prompts"]], "metrics": {}}).encode()
        return respond

    with Peer(answer(0.02)) as fast, Peer(answer(0.4)) as slow:
        reward = build_rewards({"any": 1.0}, urls={"any": [f"http://{fast.address}", f"http://{slow.address}"]}, batch=1)
        images, prompts = np.zeros((60, 4, 4, 3), np.uint8), [str(i) for i in range(60)]
        assert reward(images, prompts, [{}] * 60)["any"].tolist() == list(range(60))
    assert len(fast.requests) + len(slow.requests) == 62 and len(fast.requests) > 3 * len(slow.requests)


def part(count):
    return np.zeros((count, 4, 4, 3), np.uint8), [""] * count, [{}] * count


def test_a_server_that_was_found_slow_just_as_it_answered_is_asked_again():
    asked = servers.Servers("any", {"http://a": lambda send, images, *_: (np.ones(len(images)), {})}, deadline=1)
    asked.ask_all([part(1)])
    asked.servers[0].slow = True
    assert len(asked.ask_all([part(1)])) == 1


def test_the_one_picture_of_the_check_is_no_measure_of_how_long_a_part_takes(monkeypatch, capfd):
    monkeypatch.setattr(servers, "SLOW", 0.1)
    sizes = []

    def ask(send, images, *_):
        sizes.append(len(images))
        time.sleep(0.2 * (len(images) - 1))
        return np.ones(len(images)), {}

    servers.Servers("any", {"http://a": ask, "http://b": ask}, deadline=60).ask_all([part(4), part(4)])
    assert sizes == [1, 1, 4, 4] and not capfd.readouterr().err


def test_pictures_that_the_reward_fails_on_are_asked_for_three_times_in_all():
    with Peer(lambda number, body: (500, b"KeyError: 'tag'")) as one, Peer(lambda number, body: (500, b"the same")) as other:
        reward = build_rewards({"any": 1.0}, urls={"any": [f"http://{one.address}", f"http://{other.address}"]})
        with pytest.raises(RewardError, match="failed 3 times; the last answer was 500") as error:
            reward(np.zeros((1, 4, 4, 3), np.uint8), [""], [{}])
    assert one_line(error) and len(one.requests) + len(other.requests) == 2 + 3


def test_what_a_broken_server_fails_on_goes_to_one_that_works_though_it_is_busy_for_a_while():
    def answer(number, body):
        time.sleep(0.02)                                    # so that the broken server always has fewer requests
        return (503, b"busy") if number in (3, 4) else (200, b'{"scores": [1], "metrics": {}}')

    with Peer(lambda number, body: (500, b"broken")) as broken, Peer(answer) as sound:
        reward = build_rewards({"any": 1.0}, urls={"any": [f"http://{broken.address}", f"http://{sound.address}"]}, batch=1)
        assert reward(*part(12))["any"].tolist() == [1] * 12
    assert len(broken.requests) > 1


@pytest.mark.parametrize("other", ["busy", "silent"])
def test_what_fails_once_goes_back_there_while_another_server_has_no_time(monkeypatch, other):
    """The other one answers a look, so it counts as here."""
    def ask(send, images, prompts, metadata):
        asked.append(len(images))
        if len(asked) == 2:
            raise Unanswered("500 out of memory", 500)
        return np.ones(len(images)), {}

    def has_no_time(send, images, prompts, metadata):
        if other == "busy":
            raise Unanswered("503", 503)
        time.sleep(0 if not asked_other else 8)
        asked_other.append(1)
        return np.ones(len(images)), {}

    asked, asked_other = [], []
    monkeypatch.setattr(servers, "SLOW", 0.3)
    monkeypatch.setattr(servers, "LOOK_AGAIN", (0.1, 0.3))
    monkeypatch.setattr(servers.http_client(), "get", lambda *_, **__: httpx2.Response(200))
    started = time.monotonic()
    answers = servers.Servers("any", {"http://a": ask, "http://b": has_no_time}, deadline=20).ask_all([part(1)] * 6)
    assert len(answers) == 6 and time.monotonic() - started < 5


def test_pictures_that_fail_at_every_server_end_in_a_line_that_names_them_all():
    def broken(*_):
        raise Unanswered("500 KeyError", 500)

    urls = ["http://a", "http://b", "http://c", "http://d"]
    with pytest.raises(RewardError, match=f"^{' and '.join(urls)} failed 4 times; the last answer was 500 KeyError$"):
        servers.Servers("any", dict.fromkeys(urls, broken), deadline=1).ask_all([part(1)])


@pytest.mark.parametrize("urls, says", [(["http://a:1", "b:1"], "'b:1'"), ([], "''"), (["http://a:1", 5], "'5'")])
def test_a_list_with_what_is_no_url_is_one_line(urls, says):
    with pytest.raises(ValueError) as error:
        check_reward_weights({"geneval": 1.0}, {"geneval": urls})
    assert one_line(error, "'geneval'", says)


def test_openai_servers_in_a_list_are_refused_in_one_line():
    with pytest.raises(ValueError) as error:
        build_rewards({"qwenvl": 1.0}, urls={"qwenvl": ["openai+http://a:1/v1", "openai+http://b:1/v1"]})
    assert one_line(error, "'qwenvl'", "one openai+ URL")


def refused(line):
    with pytest.raises(ConfigError) as error:
        validate(parse_config(line.split())[1])
    return error


def test_the_command_line_takes_a_name_several_times_and_refuses_half_a_pair_and_a_repeated_server():
    line = "--rewards geneval 1 --reward-urls geneval http://a:1 geneval http://b:1 "
    config = parse_config(line.split())[1]
    validate(config)
    assert config.urls == {"geneval": ["http://a:1", "http://b:1"]}
    assert one_line(refused(line + "geneval"), "reward-urls", "geneval")
    assert one_line(refused(line + "geneval http://a:1"), "--reward-urls is", "a server stands there twice")
