"""Which key and which headers go to which server, and what is told before anything is sent."""

import pytest

from persona_lens.clients.client import OpenAIClient
from tests.client_cases import SECRET, asked, client_of, forget_settings
from tests.fault_server import FaultServer


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    forget_settings(monkeypatch)


def headers_at(server, **settings):
    client_of(server, **settings).complete(asked())
    return server.seen[-1].headers


def test_openais_key_goes_to_no_other_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", SECRET + "admin")
    with FaultServer() as server:
        assert SECRET not in str(headers_at(server))


def test_the_projects_own_variable_or_the_one_that_is_named_holds_the_key_of_another_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("PERSONA_LENS_API_KEY", " sk-own\n")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    with FaultServer() as server:
        assert headers_at(server)["authorization"] == "Bearer sk-own"
        assert headers_at(server, key_variable="MY_KEY")["authorization"] == "Bearer sk-mine"
        assert headers_at(server, key_variable="OPENAI_API_KEY")["authorization"] == "Bearer sk-openai"


def test_a_key_is_read_when_it_is_used_so_that_it_can_be_set_later(monkeypatch):
    with FaultServer(key=SECRET) as server:
        client = client_of(server)
        monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
        assert client.complete(asked()).text


AMBIENT = {
    "OPENAI_ORG_ID": "org-mine",
    "OPENAI_PROJECT_ID": "proj-mine",
    "OPENAI_CUSTOM_HEADERS": "X-Gateway: gate-mine\nx-other:other-mine\nAuthorization: Bearer auth-mine",
}


@pytest.mark.parametrize("authorization", ["Authorization", "authorization"])
def test_headers_of_the_environment_go_to_no_server_that_is_named(authorization, monkeypatch):
    for name, value in AMBIENT.items():
        monkeypatch.setenv(name, value.replace("Authorization", authorization))
    monkeypatch.setenv("PERSONA_LENS_API_KEY", SECRET)
    with FaultServer() as server:
        sent = headers_at(server)
    assert "mine" not in str(sent)
    assert sent["authorization"] == f"Bearer {SECRET}"
    assert not {"openai-organization", "openai-project", "x-gateway", "x-other"} & set(sent)


def test_a_server_of_the_environment_gets_the_key_and_headers_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for name, value in AMBIENT.items():
        monkeypatch.setenv(name, value.partition("\nAuth")[0])
    with FaultServer(key=SECRET) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        client = OpenAIClient("tiny")
        assert client.complete(asked()).text
        sent = server.seen[0].headers
    assert client.name == f"tiny at {server.url}"
    assert (sent["openai-organization"], sent["openai-project"]) == ("org-mine", "proj-mine")
    assert (sent["x-gateway"], sent["x-other"]) == ("gate-mine", "other-mine")


@pytest.mark.parametrize("settings", [{}, {"base_url": "https://api.openai.com/v1/"}], ids=["default", "named"])
def test_a_missing_key_is_told_with_its_variable(settings):
    with pytest.raises(ValueError, match="wants a key: set the environment variable OPENAI_API_KEY"):
        OpenAIClient("gpt-4.1-mini", **settings).complete(asked())


def test_a_missing_key_is_told_before_anything_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", "  ")
    with FaultServer() as server:
        client = client_of(server, key_variable="MY_KEY")
        with pytest.raises(ValueError, match="wants a key: set the environment variable MY_KEY"):
            client.complete(asked())
    assert not server.seen


@pytest.mark.parametrize(
    "url",
    ["http://me:pw-secret@127.0.0.1:1/v1", "http://pw-secret@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?key=pw-secret"],
)
def test_a_url_with_a_password_or_a_query_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="carries no password and no query") as told:
        OpenAIClient("tiny", base_url=url)
    assert "pw-secret" not in str(told.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://127.0.0.1/v1", "v1", "http:///v1"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="Expected a server's URL such as http://localhost:8000/v1, got"):
        OpenAIClient("tiny", base_url=url)


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"max_retries": -1}, {"timeout": 0.0}], ids=str)
def test_settings_that_no_call_can_have_are_refused(settings):
    with pytest.raises(ValueError, match=r"Expected concurrency >= 1, max_retries >= 0 and timeout > 0; got "):
        OpenAIClient("tiny", base_url="http://127.0.0.1:1/v1", **settings)


def test_openais_own_url_given_by_name_gets_what_is_set_for_openai():
    assert OpenAIClient("gpt-4.1-mini", base_url="https://api.openai.com/v1/").endpoint.withheld_headers == {}
