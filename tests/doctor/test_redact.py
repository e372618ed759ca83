"""No secret of a kubeconfig leaves this host, wherever it stands, and a name is the same placeholder everywhere."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.doctor.redact import REMOVED, Names, secrets_of, shape, throughout, without_secrets

MARK = "s3kr1t"
secrets = st.text(string.printable.strip() + "ä漢 \n", min_size=2, max_size=40).map(lambda text: MARK + text)
words = st.sampled_from(["prod", "ann", "api", "corp", "big"])
PLACES = ("token", "password", "client-key-data", "client-certificate-data", "id-token", "x", "username", "preferences")
nested = st.recursive(
    secrets, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PLACES), inner, max_size=3)
)
user = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(PLACES, nested),
        "auth-provider": st.fixed_dictionaries({"name": words, "config": nested}),
        "exec": st.fixed_dictionaries(
            {
                "command": words,
                "args": nested,
                "env": st.lists(st.fixed_dictionaries({"name": words, "value": secrets})),
            }
        ),
    },
)
passwords = st.text(string.ascii_letters + string.digits + ":/@ ", min_size=2, max_size=20).map(
    lambda text: MARK + text
)
cluster = st.fixed_dictionaries(
    {"server": words.map("https://{}.example:6443".format)},
    optional={"proxy-url": passwords.map("http://ann:{}@proxy:3128".format), "certificate-authority-data": secrets},
)
kubeconfigs = st.fixed_dictionaries(
    {
        "users": st.lists(st.fixed_dictionaries({"name": words, "user": user}, optional={"token": nested}), max_size=3),
        "clusters": st.lists(st.fixed_dictionaries({"name": words, "cluster": cluster}), max_size=2),
        "contexts": st.lists(
            st.fixed_dictionaries(
                {
                    "name": words,
                    "context": st.fixed_dictionaries({"cluster": words, "user": words}, optional={"x": secrets}),
                }
            ),
            max_size=2,
        ),
    },
    optional={"preferences": nested, "extensions": nested, "token": nested},
)


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in texts(one)]
    return [text for one in value for text in texts(one)] if isinstance(value, list) else [value]


@given(kubeconfigs)
def test_no_secret_survives(kubeconfig: dict[str, Any]) -> None:
    shown = json.dumps(shape(kubeconfig), ensure_ascii=False)
    assert MARK not in shown
    known = secrets_of(kubeconfig)
    log = "\n".join(f"asked with {text}, refused" for text in texts(kubeconfig))
    assert MARK not in without_secrets(log, known)
    assert MARK not in json.dumps(throughout(kubeconfig, lambda text: without_secrets(text, known)))


@given(st.recursive(st.none() | st.booleans() | st.integers() | secrets,
                    lambda inner: st.lists(inner) | st.dictionaries(words | st.just("users"), inner)))  # fmt: skip
def test_what_is_no_kubeconfig_shows_nothing(value: Any) -> None:
    assert MARK not in json.dumps(shape(value))


def test_what_is_harmless_stays() -> None:
    kubeconfig = {
        "current-context": "prod",
        "contexts": [{"name": "prod", "context": {"cluster": "big", "user": "ann", "namespace": "shop"}}],
        "clusters": [{"name": "big", "cluster": {"server": "https://api.corp.example:6443"}}],
        "users": [{"name": "ann", "user": {"exec": {"command": "log-in", "args": ["--as", "me"]}}}],
    }
    shown = json.loads(json.dumps(shape(kubeconfig)))
    assert shown["contexts"] == kubeconfig["contexts"] and shown["clusters"] == kubeconfig["clusters"]
    assert shown["users"] == [{"name": "ann", "user": {"exec": {"command": "log-in", "args": REMOVED}}}]


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer SECRET-1.2",
        '{"Authorization": "Basic SECRET=="}',
        "bearer SECRET",
        "http://ann:SECRET@proxy:3128",
        "token=SECRET&x=1",
        '"password": "SECRET"',
        "client_secret: SECRET",
        "eyJhbGciSECRET.eyJzdWIi.c2ln",
        "-----BEGIN RSA PRIVATE KEY-----\nSECRET\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nSECRET, cut off",
        "SECRET" + "QUJD" * 40,
    ],
)
def test_what_looks_like_a_secret(text: str) -> None:
    assert "SECRET" not in without_secrets(f"it said {text}\nand went on", ())
    assert without_secrets(f"it said {text}", ()).startswith("it said ")


def test_names_become_the_same_placeholder_everywhere() -> None:
    names = Names({"user": ["ann", "root"], "namespace": ["shop", "default"], "host": ["laptop7"]}, {"com", "net"})
    said = names.replace(
        "ann@laptop7 asks api.corp.com and db.corp.com, then api.corp.com, of shop and default; planned"
    )
    assert said == "user-1@host-1 asks domain-1 and domain-2, then domain-1, of namespace-1 and default; planned"
    assert names.replace("Ann at api.corp.com") == "user-1 at domain-1"


def test_addresses_that_are_public() -> None:
    names = Names({}, set())
    said = names.replace(
        "1.1.1.1 10.0.0.0/8 2606:4700::1111 fd00::1 ff02::1 127.0.0.1 246.1.2.3 1.1.1.1 52:54:00:12:34:56"
    )
    assert said == "address-1 10.0.0.0/8 address-2 fd00::1 ff02::1 127.0.0.1 246.1.2.3 address-1 mac-1"


def test_what_everybody_has_stays() -> None:
    said = "tpvpn.doctor/1 kubernetes.default.svc.cluster.local networking.k8s.io /etc/resolv.conf 10:30:07"
    assert Names({}, {"com", "io"}).replace(said) == said
