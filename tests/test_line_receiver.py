"""The original's names, from the original's paths."""

from __future__ import annotations

import importlib
import io
import sys

import pytest

from achilles import calls, config, configuring
from achilles.errors import ConfigurationError
from achilles.node import loop as node_module
from achilles.server import listen

pytestmark = pytest.mark.usefixtures("unconfigured")


@pytest.mark.parametrize(("module", "names"), [
    ("achilles_main", {
        "map": calls.map, "imap": calls.imap, "imap_unordered": calls.imap_unordered, "killCluster": calls.kill_cluster,
        "getClusterStatus": calls.cluster_status, "genConfig": configuring.ask_config}),
    ("achilles_server", {"runAchillesServer": listen.run_server, "genConfig": configuring.ask_config}),
    ("achilles_node", {"runAchillesNode": node_module.run_node}),
])
def test_they_are_the_packages_own(module, names):
    found = importlib.import_module(f"achilles.lineReceiver.{module}")
    for name, value in names.items():
        assert getattr(found, name) is value
    assert set(found.__all__) == {*names, "genConfig"}


def test_a_nodes_genconfig_keeps_the_username_and_the_secret(unconfigured):
    from achilles.lineReceiver.achilles_main import genConfig
    from achilles.lineReceiver.achilles_node import genConfig as genNodeConfig

    genConfig("127.0.0.1", 9999, "foo", "bar")
    assert genNodeConfig("127.0.0.1", 8888) == str(unconfigured)
    assert genNodeConfig(port=7777)
    assert config.read_file(unconfigured) == {
        "HOST": "127.0.0.1", "PORT": "7777", "USERNAME": "foo", "SECRET_KEY": "bar"}
    with pytest.raises(TypeError):
        genNodeConfig("127.0.0.1", 1, "foo")


def test_a_nodes_genconfig_needs_no_file(unconfigured):
    from achilles.lineReceiver.achilles_node import genConfig

    genConfig("127.0.0.1", 8888)
    assert config.read_file(unconfigured) == {"HOST": "127.0.0.1", "PORT": "8888"}
    with pytest.raises(ConfigurationError, match="Nodes authenticate too"):
        config.resolve(role="node")


@pytest.mark.parametrize("module", ["achilles_main", "achilles_server", "achilles_node"])
def test_genconfig_without_arguments_asks_saves_and_says_where(module, unconfigured, monkeypatch, capfd):
    genConfig = importlib.import_module(f"achilles.lineReceiver.{module}").genConfig

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("127.0.0.1\n9876\nfoo\n"))
    monkeypatch.setattr("getpass.getpass", lambda prompt: "a secret")
    assert genConfig() == str(unconfigured)
    out, err = capfd.readouterr()
    assert str(unconfigured) in err and out == "" and "a secret" not in err
    assert config.read_file(unconfigured) == {
        "HOST": "127.0.0.1", "PORT": "9876", "USERNAME": "foo", "SECRET_KEY": "a secret"}
