"""What the environment says about the hub, and the errors that name it."""

import pytest
from huggingface_hub import constants, errors

from cosmos_cli.download import hub
from cosmos_cli.download.assets import Asset
from cosmos_cli.errors import UserError

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# The class of all network errors, from httpx or httpx2.
NETWORK_ERROR = errors.HfHubHTTPError.__bases__[0]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def refusal(tmp_path, error=None):
    """Returns the UserError of a request that ends with an error."""
    with (
        pytest.raises(UserError) as refused,
        hub.user_errors(Asset("owner/name", "dataset", tmp_path, ())),
    ):
        if error:
            raise error
    return refused.value


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:99999", "https://hub\n", "hub.example", "", "ftp://hub", "http://"],
)
def test_an_endpoint_that_is_not_a_url_is_named(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError) as refused:
        hub.check_endpoint()
    assert refused.value.code == 3
    assert str(refused.value).startswith("HF_ENDPOINT: must be a URL such as")
    assert "`unset HF_ENDPOINT`" in refused.value.fix


@pytest.mark.parametrize("endpoint", ["https://hf.example", "http://10.0.0.1:8080/api/models/"])
def test_a_mirror_may_have_a_port_and_a_path(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    hub.check_endpoint()


@pytest.mark.parametrize(
    ("token", "shown"), [('"hf_abc"', "'\"'"), ("hf_\u200babc", r"'\u200b'"), ("hf é", "' '")]
)
def test_a_token_that_no_header_can_hold_is_refused_unseen(monkeypatch, tmp_path, token, shown):
    monkeypatch.setenv("HF_TOKEN", token)
    refused = refusal(tmp_path)
    assert str(refused).startswith(f"HF_TOKEN: holds {shown}, which no token has")
    assert "hf_abc" not in str(refused)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(token)
    assert refusal(tmp_path).where == str(tmp_path / "token")


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1080", "http://proxy:port", "foo://me:pw@x"])
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(monkeypatch, tmp_path, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    refused = refusal(tmp_path)
    assert refused.code == 3
    assert refused.where == "ALL_PROXY"
    assert "http, https, socks5, socks5h" in refused.what
    assert "pw" not in str(refused)
    monkeypatch.setenv("NO_PROXY", "*")
    assert refusal(tmp_path, NETWORK_ERROR("refused")).what == "cannot be reached: refused"


def test_a_dead_proxy_is_named_with_the_hub_that_was_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    monkeypatch.setenv("https_proxy", "http://me:pw@proxy.example:3128")
    refused = refusal(tmp_path, NETWORK_ERROR("Connection refused"))
    assert refused.code == 4
    assert str(refused) == (
        "https://mirror.example/datasets/owner/name: cannot be reached through the proxy "
        "http://***@proxy.example:3128 (https_proxy): Connection refused; "
        "check the proxy, or run `unset https_proxy`"
    )
    monkeypatch.setenv("no_proxy", "mirror.example")
    refused = refusal(tmp_path, NETWORK_ERROR("Connection refused"))
    assert refused.what == "cannot be reached: Connection refused"
    assert refused.fix == "check the network and HF_ENDPOINT"


def test_offline_mode_is_named_instead_of_the_network(tmp_path):
    refused = refusal(tmp_path, errors.OfflineModeIsEnabled("offline"))
    assert refused.what == "cannot be reached: HF_HUB_OFFLINE is set"
