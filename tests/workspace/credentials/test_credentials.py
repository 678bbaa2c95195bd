# SPDX-License-Identifier: Apache-2.0
"""Credentials are found wherever an image can hold them, and nothing else is taken for one.

Every token here is made up as the test runs; none is written down.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import re
import secrets
import shutil
import string
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workspace.container import restore
from workspace.credentials import files as searched_files
from workspace.credentials.content import listed, search_environment
from workspace.credentials.files import search_paths, search_tar
from workspace.credentials.image import search_configuration, search_image, search_saved_image
from workspace.host.errors import WorkspaceError
from workspace.host.git import git

# Characters of a token, by the letter that stands for them below.
ALPHABETS = {
    "L": string.ascii_letters + string.digits,
    "W": string.ascii_letters + string.digits + "_-",
    "S": string.ascii_letters + string.digits + "+/",
    "H": string.digits + "abcdef",
    "b": string.ascii_lowercase + string.digits,
    "U": string.ascii_uppercase + string.digits,
    "B": string.ascii_uppercase + "234567",
    "A": string.ascii_letters,
    "D": string.digits,
}
UUID = "{H8}-{H4}-4{H3}-{H4}-{H12}"
# As the owners of the formats write them: {W20} stands for 20 characters of the alphabet W. In two
# parts what a scanner of this file would take for a token.
FORMATS = {
    # models and their hosts
    "hf_{L34}": "Hugging Face token",
    "api_org_{L34}": "Hugging Face token",
    "sk-{L48}": "API key",
    "sk-proj-{W74}T3BlbkFJ{W74}": "API key",
    "sk-ant-api03-{W93}AA": "API key",
    "sk-or-v1-{H64}": "API key",
    "nvapi-{W64}": "NVIDIA API key",
    "gsk_{L52}": "Groq API key",
    "xai-{L80}": "xAI API key",
    "pplx-{L48}": "Perplexity API key",
    "r8_{L37}": "Replicate token",
    "tgp_v1_{W43}": "Together API key",
    "fw_{L24}": "Fireworks API key",
    "csk-{b48}": "Cerebras API key",
    "pcsk_{L6}_{L63}": "Pinecone API key",
    "lsv2_pt_{H32}_{H10}": "LangSmith API key",
    "tvly-dev-{L32}": "Tavily API key",
    "sk_{H48}": "ElevenLabs API key",
    "rpa_{U42}": "RunPod API key",
    "jina_{H32}{L28}": "Jina API key",
    # clouds
    "AKIA{B16}": "AWS access key",
    "ASIA{B16}": "AWS access key",
    "ABSK{S128}": "AWS Bedrock key",
    "AIza{W35}": "Google API key",
    "GOCSPX-{W28}": "Google OAuth secret",
    "ya29.{W120}": "Google OAuth token",
    "{L3}8Q~{L34}": "Azure client secret",
    "DefaultEndpointsProtocol=https;AccountName=x;AccountKey={S86}==": "Azure account key",
    "Endpoint=sb://x.invalid/;SharedAccessKeyName=k;SharedAccessKey={S43}=": "Azure account key",
    "https://x.invalid/c/b?sv=2022-11-02&sp=r&sig={L43}%3D": "Azure signature",
    "{L52}JQQJ99{U18}AZDO{L4}": "Azure key",
    "{L42}+ACR{L6}": "Azure registry password",
    "LTAI{L20}": "Alibaba access key",
    "dop_v1_{H64}": "DigitalOcean token",
    "HRKU-AA{W58}": "Heroku API key",
    "fo1_{W43}": "Fly.io token",
    "sbp_{H40}": "Supabase token",
    "pscale_tkn_{W43}": "PlanetScale password",
    "dapi{H32}": "Databricks token",
    "pul-{H40}": "Pulumi token",
    "{L14}.atlasv1.{L67}": "Terraform token",
    "hvs.{W95}": "Vault token",
    "dp.pt.{L43}": "Doppler token",
    "A3-{U6}-{U11}-{U5}-{U5}-{U5}": "1Password key",
    "tskey-auth-{L12}-{L32}": "Tailscale key",
    "sha256~{W43}": "OpenShift token",
    # code, packages, continuous integration
    "ghp_{L36}": "GitHub token",
    "ghs_{L36}": "GitHub token",
    "github_pat_{L22}_{L59}": "GitHub token",
    "glpat-{W20}": "GitLab token",
    "ATBB{L32}": "Bitbucket token",
    "ATATT3{W186}": "Atlassian token",
    "npm_{L36}": "npm token",
    "pypi-AgE{W150}": "PyPI token",
    "rubygems_{H48}": "RubyGems key",
    "cio{L32}": "crates.io token",
    "oy2{b43}": "NuGet key",
    "dckr_pat_{W27}": "Docker Hub token",
    "AKCp{L69}": "Artifactory key",
    "CCIPAT_{L22}_{H40}": "CircleCI token",
    "bkua_{b40}": "Buildkite token",
    "sqp_{H40}": "Sonar token",
    "sgp_{H16}_{H40}": "Sourcegraph token",
    # payment
    "sk_live_{L24}": "Stripe key",
    "rk_test_{L99}": "Stripe key",
    "whsec_{L32}": "Stripe webhook secret",
    "sq0csp-{W43}": "Square token",
    "access_token$production${b16}${H32}": "Braintree token",
    "rzp_live_{L14}": "Razorpay key",
    f"access-production-{UUID}": "Plaid token",
    "shpat_{H32}": "Shopify token",
    "EZAK{L54}": "EasyPost key",
    # mail and telephone
    "SG.{W22}.{W43}": "SendGrid key",
    "key-{H32}": "Mailgun key",
    "{H32}-us21": "Mailchimp key",
    "xkeysib-{H64}-{L16}": "Brevo key",
    "re_{L8}_{L24}": "Resend key",
    "SK{H32}": "Twilio key",
    # chat
    "xoxb-{D12}-{D12}-{L24}": "Slack token",
    "xapp-1-{U11}-{D13}-{H64}": "Slack token",
    "https://hooks.slack.com/services/T{U10}/B{U10}/{L24}": "Slack webhook",
    "M{L25}.{W6}.{W38}": "Discord token",
    "https://discord.com/api/webhooks/{D19}/{W68}": "Discord webhook",
    "{D10}:AA{W33}": "Telegram token",
    "https://api.telegram.org/bot{D9}:AA{W33}/getMe": "Telegram token",
    f"https://x.webhook.office.com/webhookb2/{UUID}@{UUID}/IncomingWebhook/{{H32}}/{UUID}": (
        "Teams webhook"
    ),
    f"https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key={UUID}": "WeCom webhook",
    # monitoring
    "glsa_{L32}_{H8}": "Grafana token",
    "NRAK-{U27}": "New Relic key",
    "dt0c01.{U24}.{U64}": "Dynatrace token",
    "sntryu_{H64}": "Sentry token",
    "phx_{L43}": "PostHog key",
    f"sdk-{UUID}": "LaunchDarkly key",
    # other services
    "pat{L14}.{H64}": "Airtable token",
    "apify_api_{L36}": "Apify token",
    "CFPAT-{W43}": "Contentful token",
    "sl.{W135}": "Dropbox token",
    "EAAM{L180}": "Facebook token",
    "figd_{W40}": "Figma token",
    f"pat-eu1-{UUID}": "HubSpot token",
    "lin_api_{L40}": "Linear key",
    "ntn_{D11}{L35}": "Notion token",
    "PMAK-{H24}-{H34}": "Postman key",
    "tfp_{W59}": "Typeform token",
    "1000.{H32}.{H32}": "Zoho token",
}
KEY = "-----BEGIN {}PRIVATE " + "KEY-----"


def drawn(form: str, seed: int | None = None) -> str:
    """What a form stands for, at random, so that nobody ever had it. Each long part has a letter
    behind a digit, as nearly all have; a word with a number is what is not taken for a secret."""
    choose = random.Random(secrets.randbits(64) if seed is None else seed)

    def part(found: re.Match[str]) -> str:
        alphabet, length = ALPHABETS[found[1]], int(found[2])
        while True:
            text = "".join(choose.choice(alphabet) for _ in range(length))
            mixed = found[1] in "AD" or length < 6 or re.search(r"\d[A-Za-z]", text)
            if mixed and text[0].isalnum() and text[-1].isalnum():
                return text

    return re.sub(r"\{(\w)(\d+)\}", part, form)


def token(beginning: str = "hf_", seed: int | None = None) -> str:
    """A token of the form that begins so."""
    return drawn(next(form for form in FORMATS if form.startswith(beginning)), seed)


def password() -> str:
    return secrets.token_hex(6)


def private_key() -> str:
    body = base64.encodebytes(secrets.token_bytes(400)).decode()
    return f"{KEY.format('OPENSSH ')}\n{body}-----END\n"


def web_token() -> str:
    parts = (b'{"alg":"HS256"}', b'{"sub":"me and myself"}', secrets.token_bytes(32))
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def layer(files: dict[str, str | bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            data = content.encode() if isinstance(content, str) else content
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def kinds(files: dict[str, str | bytes]) -> dict[str, str]:
    return {finding.path: finding.kind for finding in search_tar(layer(files))}


# --- variables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "NPM_TOKEN", "TOKEN", "HFTOKEN"),
        *("WANDB_API_KEY", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        *(
            "AWS_SESSION_TOKEN",
            "CLIENT_SECRET",
            "SECRET_1",
            "PGPASSWORD",
            "DB_PASSWORD_2",
            "db_pwd",
        ),
        *("UV_INDEX_PRIVATE_PASSWORD", "GH_PAT", "DOCKER_AUTH_CONFIG", "SSH_PRIVATE_KEY"),
    ],
)
def test_a_variable_named_like_a_credential_is_found_but_not_without_a_value(name: str) -> None:
    value = password()
    (found,) = search_environment({name: value})
    assert str(found) == f"credential in variable {name}"
    assert search_environment({name: ""}) == []
    assert search_environment({name: "$ELSEWHERE"}) == []


def test_ordinary_variables_are_none() -> None:
    ordinary = {
        "NVIDIA_REQUIRE_CUDA": "cuda>=13.0 brand=unknown,driver>=535,driver<536",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NV_LIBCUBLAS_PACKAGE": "libcublas-13-0=13.1.0.3-1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "MAX_TOKENS": "4096",
        "HF_TOKEN_PATH": "/cache/downloads/huggingface/token",
        "AWS_REGION": "eu-central-1",
        "GOOGLE_APPLICATION_CREDENTIALS": "/srv/key.json",
        "AWS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
        "GPG_KEY": hashlib.sha1(b"a maintainer").hexdigest().upper(),
        "PYTHON_SHA256": hashlib.sha256(b"python").hexdigest(),
        "SSH_AUTH_SOCK": "/tmp/ssh-x/agent.1",
        "GIT_ASKPASS": "/usr/lib/askpass.sh",
        "PWD": "/workspaces/x",
        "OLDPWD": "/",
        "XDG_SESSION_ID": "12",
        "UV_KEYRING_PROVIDER": "subprocess",
        "PIP_INDEX_URL": "https://index.invalid:8080/simple",
        "http_proxy": "http://proxy.invalid:3128",
        "GIT_REMOTE": "ssh://git@code.invalid/kernels.git",
        "UV_DEFAULT_INDEX": "https://${USER}:${INDEX_PASSWORD}@index.invalid/simple",
        "LS_COLORS": "rs=0:di=01;34:ln=01;36",
        "PATH": "/usr/local/bin:/usr/bin",
    }
    assert search_environment(ordinary) == []


@pytest.mark.parametrize("name", ["PIP_INDEX_URL", "UV_DEFAULT_INDEX", "http_proxy", "ANY"])
def test_a_password_in_an_address_is_found(name: str) -> None:
    (found,) = search_environment({name: f"https://me:{password()}@index.invalid/simple"})
    assert found.kind == "password in an address"


# Where a token may stand in a file that nobody expects it in.
SURROUNDINGS = {
    "app/.env": "# mine\nVALUE={}\nNEXT=1\n",
    "app/plain.env": 'export VALUE="{}"\n',
    "app/config.json": '{{"service": {{"value": "{}"}}}}',
    "deploy/values.yaml": "service:\n  value: {} # mine\n",
    "app/settings.ini": "[service]\nvalue = {}\n",
    "run/today.log": "2026-11-26 09:00:01 INFO got <{}>, 200\n",
    "run/get.txt": "GET /v1/x?value={}&page=1 HTTP/1.1\n",
    "notes": "then I ran `client {}`, and it worked.\n",
    "src/app.py": "client = Client('{}')\n",
    "nb/a.ipynb": '{{"source": ["client = Client(\\"{}\\")\\n"]}}',
    "tail.txt": "{}",
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_token_of_each_kind_is_found_wherever_it_stands(form: str) -> None:
    seed = secrets.randbits(32)
    value = drawn(form, seed)
    files: dict[str, str | bytes] = {
        name: text.format(value) for name, text in SURROUNDINGS.items()
    }
    told = search_tar(layer(files))
    assert {one.path: one.kind for one in told} == {f"/{name}": FORMATS[form] for name in files}, (
        f"{form} with seed {seed}"
    )
    told += search_environment({"MY_SETTING": f"x={value}"})
    assert told[-1].kind == FORMATS[form]
    assert value[4:] not in repr(told)


# What only its name tells: where it stands, and how it is drawn there.
BY_NAME = {
    "infra/main.tf": 'resource "db" "x" {{\n  password = "{L16}"\n}}\n',
    "infra/prod.auto.tfvars": 'db_password = "{b12}"\n',
    "infra/terraform.tfstate": '{{"attributes": {{"master_password": "{L20}", "port": 5432}}}}',
    "ansible/group_vars/all.yml": "ansible_user: me\nansible_become_pass: {L14}\n",
    "k8s/secret.yaml": "kind: Secret\nstringData:\n  password: {L16}\n",
    "docker-compose.yml": "environment:\n  - POSTGRES_PASSWORD={L16}\n",
    "compose/db.yml": "environment:\n  MYSQL_ROOT_PASSWORD: '{L16}'\n",
    "Dockerfile": "FROM x\nENV ADMIN_PASSWORD={L16}\n",
    "src/application.properties": "spring.datasource.password={L16}\n",
    "src/appsettings.json": '{{"Db": "Server=db;User Id=sa;Password={L16};Encrypt=true"}}',
    "src/web.config": '<add key="ClientSecret" value="{L32}" />',
    "m2/settings.xml": "<server><username>me</username><password>{L16}</password></server>",
    "etc/odbc.ini": "[x]\nDriver=y\nPwd={L16}\n",
    "access.log": "GET /v1/models?access_token={L32} HTTP/1.1\n",
    "proxy.log": "> Authorization: Bearer {L40}\n",
    "jdbc.log": "open jdbc:mysql://db.invalid/x?user=app&password={L16}\n",
    "db.txt": "postgres://app:{L16}@db.invalid:5432/x\n",
    "cache.toml": 'url = "redis://:{L16}@cache.invalid:6379/0"\n',
    "mongo.md": "mongodb+srv://app:{L16}@cluster.invalid/?w=majority\n",
    "ci/deploy.sh": "curl -u me:{L16} https://x.invalid\n",
    "ci/push.sh": "docker login r.invalid -u me -p {L16}\n",
    "ci/job.yml": "script: client --api-key {L32}\n",
    "twilio.env": "TWILIO_AUTH_TOKEN={H32}\n",
    "datadog.md": "export DATADOG_API_KEY={H32}\n",
    "aws.cfg": "aws_secret_access_key = {S40}\n",
    "heroku.yml": f"HEROKU_API_KEY: {UUID}\n",
    "src/cohere.py": 'COHERE_API_KEY = "{L40}"\n',
    "src/openai.py": 'os.environ["AZURE_OPENAI_API_KEY"] = "{H32}"\n',
    "src/config.js": "const config = {{ clientSecret: '{W40}' }};\n",
    "nb/b.ipynb": '{{"source": ["wandb_api_key = \\"{H40}\\"\\n"]}}',
    "src/db.php": "'db' => ['password' => '{L16}'],\n",
    "systemd/x.service": 'Environment="SERVICE_TOKEN={L24}"\n',
}


@pytest.mark.parametrize("path", BY_NAME)
def test_what_only_its_name_tells_is_found_in_settings_logs_and_sources(path: str) -> None:
    seed = secrets.randbits(32)
    text = drawn(BY_NAME[path], seed).replace("{{", "{").replace("}}", "}")
    assert list(kinds({path: text})) == [f"/{path}"], f"seed {seed}"


@pytest.mark.parametrize(
    "text",
    [
        '{{"auths": {{"r.invalid": {{"auth": "{}"}}}}}}',
        '.dockerconfigjson: \'{{"auths":{{"r.invalid":{{"username":"me","auth":"{}"}}}}}}\'\n',
        'json.loads("{{\\"auths\\": {{\\"r.invalid\\": {{\\"auth\\": \\"{}\\"}}}}}}")',
    ],
)
def test_a_login_for_a_registry_is_found_wherever_it_stands(text: str) -> None:
    login = base64.b64encode(f"me:{password()}".encode()).decode()
    for path in ("kaniko/config.json", "helm/registry.yaml", "notes.txt", "x.py"):
        assert kinds({path: text.format(login)}) == {f"/{path}": "registry login"}
    assert kinds({"kaniko/config.json": text.format("")}) == {}


# Near misses: each is what somebody writes where a credential would stand, or looks like one.
NONE_OF_THEM = {
    "infra/main.tf": """
        password = var.db_password
        password = random_password.db.result
        token    = data.vault_secret.x.data["token"]
        api_key  = "${var.api_key}"
        secret   = "changeme"
        password = "your-password-123"
    """,
    "infra/vars.auto.tfvars": 'password = "changeme"\nregion = "eu-central-1"\n',
    "deploy/values.yaml": """
        password: "{{ .Values.password }}"
        token: ${TOKEN_2}
        api_key: <your token 1>
        secretName: app-secret-2
        existingSecret: db-v2
        passwordSecretRef: {name: x1, key: y2}
        tokenizer: Qwen2Tokenizer
        secret: vault:secret/data/app1#key2
        image: sha256:{sha256}
        max_tokens: 8192
    """,
    "src/app.py": """
        token = os.environ["HF_TOKEN"]
        api_key = os.getenv("OPENAI_API_KEY_2")
        password = getpass.getpass("Password 1: ")
        eos_token = "<|reserved_special_token_128|>"
        pad_token = "[unused99]"
        entity_token = "entity_mask2_token"
        secret = settings.client_secret_v2_for_tests
        fp8_per_token = kFp8DynamicTokenSym
        headers = {"Authorization": f"Bearer {token}"}
        url = f"https://{user}:{password}@index.invalid/simple"
        hf_forward_cross_attention_hidden_states = 1
        sk_learn_style_estimator_version_1_compat = key_value_cache_v2
    """,
    "ci/job.sh": """
        docker login --username me --password-stdin public.invalid/q9t5s3a7
        docker run -u 1000:1000 -p 8000:8000 --user 0:0 image
        export HF_TOKEN=$(cat /run/secrets/token1)
        mysql -u root -p"$PASSWORD1"
        curl -H "Authorization: Bearer ${TOKEN1}" https://x.invalid
    """,
    "package-lock.json": '{"x": {"integrity": "sha512-{base64}", "resolved": "https://x.invalid/x-1.2.tgz"}}',
    "requirements.lock": "x==1.2 \\\n    --hash=sha256:{sha256}\n",
    "tree.txt": "commit {sha1}\nindex {sha1}..{sha1} 100644\n",
    "ids.json": '{"id": "{uuid}", "revision": "{sha1}", "cache_key": "{sha256}"}',
    "nb/plot.ipynb": '{"data": {"image/png": "{image}"}}',
    "model.safetensors": '\x40{"weight_token": {"dtype": "BF16", "data_offsets": [0, 128]}}{bytes}',
    "docs/usage.md": """
        postgres://user:password@localhost:5432/db
        http://user:pass@10.10.1.10:3128
        curl -u user:password1 https://x.invalid
        hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1
        export OPENAI_API_KEY=sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1
        wandb login, then copy the API key from https://x.invalid/authorize?ref=models1
    """,
}


@pytest.mark.parametrize("path", NONE_OF_THEM)
def test_a_near_miss_is_none(path: str) -> None:
    choose = random.Random(seed := secrets.randbits(32))
    text = NONE_OF_THEM[path].encode()
    for name, value in {
        "sha1": choose.randbytes(20).hex(),
        "sha256": choose.randbytes(32).hex(),
        "uuid": drawn(UUID, seed),
        "base64": base64.b64encode(choose.randbytes(64)).decode(),
        "image": base64.b64encode(choose.randbytes(100_000)).decode(),
    }.items():
        text = text.replace(f"{{{name}}}".encode(), value.encode())
    text = text.replace(b"{bytes}", choose.randbytes(4096))
    assert kinds({path: text}) == {}, f"seed {seed}"


def test_an_image_that_happens_to_hold_the_shape_of_a_token_is_none() -> None:
    choose = random.Random(seed := secrets.randbits(32))
    before, after = (base64.b64encode(choose.randbytes(3000)).decode() for _ in range(2))
    token = drawn("cio{L32}", seed)
    for mark in "/+":
        image = f'{{"data": {{"image/png": "{before}{mark}{token}{mark}{after}"}}}}'
        assert kinds({"nb/plot.ipynb": image}) == {}, f"seed {seed}"
    assert kinds({"job.log": f"GET https://x.invalid/api/v1/crates/{token}/owners"}) != {}


def test_keys_and_web_tokens_are_found_under_any_name() -> None:
    found = search_environment({"A": private_key(), "B": web_token(), "C": repr(private_key())})
    assert [one.kind for one in found] == ["private key", "JSON web token", "private key"]


around = st.text(alphabet=string.printable, max_size=300)


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**32), around, around)
def test_a_token_is_found_in_any_text(form: str, seed: int, before: str, after: str) -> None:
    content = f"{before} {drawn(form, seed)}\n{after}"
    (found,) = search_tar(layer({"notes.txt": content}))
    assert found.path == "/notes.txt"


@given(st.binary(max_size=3000), st.sampled_from(["hex", "base64", "urlsafe", "raw"]))
def test_random_content_is_none(data: bytes, form: str) -> None:
    encoded = {
        "hex": data.hex().encode(),
        "base64": base64.encodebytes(data),
        "urlsafe": base64.urlsafe_b64encode(data),
        "raw": data,
    }
    assert kinds({"data": encoded[form]}) == {}


# A slice of what prose, code and documents hold.
words = st.text(alphabet=string.ascii_lowercase + "_-", min_size=1, max_size=40)


@given(st.lists(st.one_of(words, st.sampled_from(["hf_", "sk-", "npm_", "pypi-", "://", "-----"]))))
def test_words_and_identifiers_are_none(parts: list[str]) -> None:
    assert kinds({"prose.md": " ".join(parts)}) == {}


def test_examples_of_documentation_are_none() -> None:
    text = """
    proxies = {"http": "http://user:pass@10.10.1.10:3128"}
    export HF_TOKEN=<your token>
    aws_access_key_id = AKIAIOSFODNN7EXAMPLE
    openssl writes a line with BEGIN PRIVATE KEY, then the key
    git clone https://oauth2:${TOKEN}@code.invalid/x.git
    """
    assert kinds({"README.md": text, "workspaces/x/vllm/docs/usage.md": text}) == {}


@pytest.mark.parametrize(
    "part", ["abcdefgh", "aB", "a1", "a1_", "A= b", "token: ", "login -p ", "x://", "auths", "hf_ "]
)
def test_a_long_line_takes_time_in_proportion_to_its_length(part: str) -> None:
    text = f'"token": "{part * 10_000}'
    begin = time.process_time()
    kinds({"x.json": text[:10_000], "x.txt": text[:10_000]})
    once = time.process_time() - begin
    kinds({"x.json": text[:40_000], "x.txt": text[:40_000]})
    # Four times the length: sixteen times the time would be the square of it.
    assert time.process_time() - begin - once < 10 * once + 1


# --- files ---------------------------------------------------------------------------------------

BY_PATH = [
    *(".cache/huggingface/token", ".cache/huggingface/stored_tokens", ".git-credentials"),
    *(".config/git/credentials", ".netrc", ".local/share/uv/credentials/index.invalid"),
    *(".ssh/id_ed25519", ".ssh/id_rsa_work", ".aws/credentials", ".azure/msal_token_cache.json"),
    *(".config/gcloud/application_default_credentials.json", ".cargo/credentials.toml"),
    *(".gnupg/private-keys-v1.d/A.key", ".kaggle/kaggle.json"),
    *(".config/gcloud/legacy_credentials/me/adc.json", ".continuum/anaconda-client/tokens/t"),
    *(".vscode-server/.0123abc.token", ".vscode/cli/token.json"),
]
HISTORIES = [
    *(".bash_history", ".zsh_history", ".python_history", ".sqlite_history", ".viminfo"),
    *(".node_repl_history", ".ipython/profile_default/history.sqlite"),
    *(".local/share/fish/fish_history", ".local/share/jupyter/runtime/jupyter_cookie_secret"),
    *(".local/share/jupyter/runtime/jpserver-12.json", ".ray/auth_token"),
]


@pytest.mark.parametrize("home", ["/srv", "/srv/someone", "/"])
def test_places_of_credentials_are_found_by_their_path(home: str) -> None:
    paths = [str(Path(home) / path) for path in BY_PATH]
    found = search_paths(paths)
    assert [one.path for one in found] == paths
    assert not any(one.scrubbed for one in found)
    assert sorted(kinds(dict.fromkeys(paths, "x"))) == sorted(paths)


@pytest.mark.parametrize("path", HISTORIES)
def test_histories_are_found_and_may_be_removed(path: str) -> None:
    (found,) = search_paths([f"/srv/someone/{path}"])
    assert found.scrubbed


def test_mounted_secrets_are_found_and_folders_are_not() -> None:
    assert [one.path for one in search_paths(["/run", "/run/secrets", "/run/secrets/index"])] == [
        "/run/secrets/index"
    ]


def test_other_files_in_the_same_folders_are_none() -> None:
    paths = [
        *(".ssh/id_rsa.pub", ".ssh/known_hosts", ".ssh/config", ".ssh/authorized_keys", ".lesshst"),
        *(".config/gcloud/active_config", ".aws/config", ".gnupg/pubring.kbx", ".cache/x/token"),
        *(".cache/huggingface/hub/version.txt", "vllm/tokenizers/token.py", ".netrc.md", ".ssh"),
    ]
    paths = [f"/srv/someone/{path}" for path in paths]
    assert search_paths(paths) == []
    assert kinds(dict.fromkeys(paths, "text")) == {}


def test_an_empty_file_and_a_removed_one_are_none() -> None:
    assert kinds({"/srv/.netrc": "", "/srv/.wh..netrc": "x", "/run/secrets/index": ""}) == {}


WITH_CONTENT = {
    "tight/.pypirc": "[pypi]\npassword= {}\n",
    ".pypirc": "[pypi]\nusername = __token__\npassword = {}\n",
    ".config/pip/pip.conf": "[global]\nindex-url = https://me:{}@index.invalid/simple\n",
    "/etc/pip.conf": "[global]\nextra-index-url =\n  https://me:{}@index.invalid/simple\n",
    "/etc/xdg/pip/pip.conf": "[global]\nproxy = http://me:{}@proxy.invalid:3128\n",
    ".config/uv/uv.toml": '[[index]]\nurl = "https://me:{}@index.invalid/simple"\n',
    ".npmrc": "//npm.invalid/:_authToken={}\n",
    "work/.npmrc": "//npm.invalid/:_password={}\n",
    ".gitconfig": '[url "https://me:{}@code.invalid/"]\n\tinsteadOf = https://code.invalid/\n',
    "x/.git/config": '[remote "origin"]\n\turl = https://me:{}@code.invalid/x.git\n',
    "y/.git/config": '[http "https://c.invalid/"]\n\textraheader = AUTHORIZATION: basic {}\n',
    "x/.git/logs/HEAD": "0 1 U <u@x> 0 +0000\tclone: from https://me:{}@code.invalid/x.git\n",
    ".config/gh/hosts.yml": "code.invalid:\n    oauth_token: {}\n    user: me\n",
    ".docker/config.json": '{{"auths": {{"r.invalid": {{"auth": "{}"}}}}}}',
    ".kube/config": "users:\n- name: me\n  user:\n    token: {}\n",
    "other/.kube/config": "users:\n- user:\n    client-key-data: {}\n",
    ".condarc": "channels:\n  - https://conda.invalid/t/{}/channel\n",
    ".config/wandb/settings": "[default]\napi_key = {}\n",
    ".jupyter/jupyter_server_config.py": "c.ServerApp.token = '{}'\n",
    ".jupyter/jupyter_server_config.json": '{{"ServerApp": {{"password": "argon2:{}"}}}}',
    "/etc/apt/auth.conf.d/mirror.conf": "machine mirror.invalid login me password {}\n",
    "/etc/apt/sources.list": "deb https://me:{}@mirror.invalid/debian bookworm main\n",
    "/etc/environment": "WANDB_API_KEY={}\n",
    "/etc/profile.d/me.sh": "export WANDB_API_KEY={}\n",
    ".bashrc": "alias ll='ls -l'\nexport WANDB_API_KEY='{}'\n",
    ".config/fish/config.fish": "set -gx HF_HOME /x\nexport WANDB_API_KEY={}\n",
    "checkout/.env": "# mine\nWANDB_API_KEY={}\n",
    "checkout/.env.local": 'DB_PASSWORD="{}"\n',
    "checkout/.envrc": "export DB_PASSWORD={}\n",
    "/etc/shadow": "root:$6$abc${}:19000:0:99999:7:::\n",
}


def place(path: str) -> str:
    return path if path.startswith("/") else f"/srv/someone/{path}"


@pytest.mark.parametrize("path", WITH_CONTENT)
def test_settings_with_a_credential_are_found(path: str) -> None:
    value = password()
    (found,) = search_tar(layer({place(path): WITH_CONTENT[path].format(value)}))
    assert found.path == place(path)
    assert value not in repr(found)


def test_settings_without_one_are_none() -> None:
    settings = {
        ".npmrc": "registry=https://npm.invalid/\n//npm.invalid/:_authToken=${NPM_TOKEN}\n",
        ".config/pip/pip.conf": "[global]\nindex-url = https://index.invalid/simple\n",
        ".config/uv/uv.toml": 'keyring-provider = "subprocess"\n',
        ".gitconfig": "[user]\n\tname = U\n[credential]\n\thelper = store\n",
        "x/.git/config": '[remote "o"]\n\turl = ssh://git@code.invalid/x.git\n',
        "y/.git/config": '[remote "o"]\n\turl = git@code.invalid:x.git\n',
        ".docker/config.json": '{"credsStore": "secretservice", "auths": {"r.invalid": {}}}',
        ".config/gh/hosts.yml": "code.invalid:\n    user: me\n    git_protocol: https\n",
        ".condarc": "channels:\n  - conda-forge\n",
        "/etc/environment": 'PATH="/usr/bin:/bin"\n',
        "/etc/shadow": "root:*:19000:0:99999:7:::\ndev:!:19000:0:99999:7:::\n",
        ".bashrc": '[ -z "$PS1" ] && return\nexport HF_TOKEN=$(cat /run/x)\n',
        "checkout/.env": "HF_TOKEN=\nDEVICE=cpu\nMAX_TOKENS=64\n",
        "/etc/apt/sources.list": "deb http://deb.invalid/debian bookworm main\n",
    }
    assert kinds({place(path): text for path, text in settings.items()}) == {}


def test_a_private_key_is_found_under_any_name_and_deep_in_a_large_file() -> None:
    filler = "a line of text\n" * 350_000
    found = kinds({"opt/deploy": private_key(), "big.log": filler + private_key() + filler})
    assert found == {"/opt/deploy": "private key", "/big.log": "private key"}


def test_a_token_across_the_borders_of_what_is_read_at_once_is_found() -> None:
    for shift in (5, 17, 33):
        filler = " " * (searched_files.CHUNK - shift)
        assert kinds({"big.txt": filler + token() + " "}) == {"/big.txt": "Hugging Face token"}


def test_a_token_close_behind_something_alike_is_found() -> None:
    assert kinds({"notes.txt": "chat-" + token("glpat-")}) == {"/notes.txt": "GitLab token"}


def test_a_token_in_a_small_binary_is_found() -> None:
    assert kinds({"data.sqlite": b"\0\1\2" + token().encode() + b"\0"}) == {
        "/data.sqlite": "Hugging Face token"
    }


def test_a_value_in_a_file_name_is_not_shown() -> None:
    value = token()
    (found,) = search_tar(layer({f"x/{value}.txt": token("ghp_")}))
    assert value not in str(found)


# --- samples that a package brought -------------------------------------------------------------

SITE = "opt/env/lib/python3.12/site-packages"


def recorded(how: str, name: str, content: bytes) -> dict[str, str | bytes]:
    """What a package manager writes about a file of its own."""
    sha256 = hashlib.sha256(content)
    urlsafe = base64.urlsafe_b64encode(sha256.digest()).rstrip(b"=").decode()
    if how == "wheel":
        lines = f"a.py,sha256=x,1\n{name},sha256={urlsafe},{len(content)}\n"
        return {f"{SITE}/{name}": content, f"{SITE}/tor-1.dist-info/RECORD": lines}
    if how == "conda":
        meta = {"paths_data": {"paths": [{"_path": name, "sha256": sha256.hexdigest()}]}}
        return {f"opt/conda/{name}": content, "opt/conda/conda-meta/tor-1.json": json.dumps(meta)}
    md5 = hashlib.md5(content).hexdigest()
    lines = f"{md5}  usr/share/doc/{name}\n"
    return {f"usr/share/doc/{name}": content, "var/lib/dpkg/info/tor.md5sums": lines}


@pytest.mark.parametrize("how", ["wheel", "conda", "debian"])
@pytest.mark.parametrize("record_first", [True, False])
def test_a_packages_own_sample_is_none_until_it_is_edited(how: str, record_first: bool) -> None:
    files = recorded(how, "tor/test/test.key", private_key().encode())
    ordered = dict(
        sorted(files.items(), key=lambda one: "test.key" in one[0], reverse=not record_first)
    )
    assert kinds(ordered) == {}
    (key,) = (path for path in files if path.endswith("test.key"))
    edited = ordered | {key: private_key()}
    assert kinds(edited) == {f"/{key}": "private key"}


def test_a_file_beside_a_package_is_no_sample() -> None:
    files = recorded("wheel", "tor/test/test.key", private_key().encode())
    assert kinds(files | {f"{SITE}/mine.key": private_key()}) == {
        f"/{SITE}/mine.key": "private key"
    }


def test_a_sample_in_a_release_of_vllm_is_none_in_a_snapshot_until_it_is_edited(
    tmp_path: Path,
) -> None:
    version, tree = "9.9.9", tmp_path / "vllm-fork" / "releases" / "9.9.9"
    tree.mkdir(parents=True)
    names = ["tests/of.py", "tests/other.py"]

    def write(name: str) -> None:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(f'API_KEY = "{token()}"\n')

    def found() -> set[str]:
        lists = {"opt/vllm-kernels/snapshot/vllm-9.9.9.md5sums": restore.released(tree, version)}
        inside = [path for path in tree.rglob("*.py") if path.is_file()]
        files = {str(path.relative_to("/")): path.read_bytes() for path in inside}
        return {Path(path).name for path in kinds(files | lists)}

    for name in names:
        write(name)
    git("init", "-q", tree=tree)
    git("add", ".", tree=tree)
    git("-c", "user.name=U", "-c", "user.email=u@x.invalid", "commit", "-qm", "Release", tree=tree)
    git("tag", f"upstream/{version}", tree=tree)
    assert found() == set()
    write(names[0])  # an edit
    write("tests/mine.py")  # a file of the user's
    (tree / names[1]).unlink()
    assert found() == {"of.py", "mine.py"}
    git("add", ".", tree=tree)
    git("-c", "user.name=U", "-c", "user.email=u@x.invalid", "commit", "-qm", "Mine", tree=tree)
    assert found() == {"of.py", "mine.py"}


# --- an image's configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("RUN |1 HF_TOKEN={} /bin/sh -c make # buildkit", "credential"),
        ("/bin/sh -c #(nop)  ENV WANDB_API_KEY={}", "credential"),
        ("ARG INDEX_PASSWORD={}", "credential"),
        ("RUN /bin/sh -c login --user me --password {}", "credential"),
        ("RUN /bin/sh -c curl -H 'Authorization: Bearer {}' https://x.invalid", "credential"),
        (
            "RUN /bin/sh -c pip install -i https://me:{}@index.invalid/simple x",
            "password in an address",
        ),
    ],
)
def test_a_value_in_a_step_of_the_history_is_found(step: str, kind: str) -> None:
    value = password()
    steps = [{"created_by": "RUN make"}, {"created_by": step.format(value)}]
    (found,) = search_configuration({"history": steps})
    assert str(found) == f"{kind} in step 2 of the history"
    assert value not in repr(found)


def test_commands_and_steps_without_one_are_none() -> None:
    configuration: dict[str, Any] = {
        "config": {
            "Env": ["PATH=/usr/bin", "HF_HOME=/cache", "HF_TOKEN="],
            "Cmd": ["bash", "-c", "vllm serve --max-num-batched-tokens 8192"],
            "Labels": {"org.opencontainers.image.revision": hashlib.sha1(b"x").hexdigest()},
            "ExposedPorts": {"8888/tcp": {}},
        },
        "history": [
            {"created_by": "RUN |2 UV_VERSION=0.9 UV_SHA256=" + hashlib.sha256(b"x").hexdigest()},
            {"created_by": "RUN if [ -f /run/secrets/index ]; then . /run/secrets/index; fi"},
            {"created_by": "RUN --mount=type=secret,id=token TOKEN=$(cat /run/secrets/token) make"},
        ],
    }
    assert search_configuration(configuration) == []


# --- a real engine -------------------------------------------------------------------------------

# A static program as the image's shell: it removes what it is given, and needs no distribution.
SHELL = (
    "#include <unistd.h>\nint main(int n, char **a) { while (n-- > 1) unlink(a[n]); return 0; }\n"
)


def program_and_libraries(name: str) -> set[str]:
    """This machine's program with the libraries that it loads."""
    program = shutil.which(name)
    assert program
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return {program, *re.findall(r"(/\S+)", listed)}


class Engine:
    """Docker's client, and the images that a test makes."""

    def __init__(self, folder: Path) -> None:
        self.client = shutil.which(os.environ.get("DOCKER") or "docker") or ""
        self.folder = folder
        self.made: list[str] = []

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> str:
        result = subprocess.run(
            [self.client, *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
        )
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout.decode().strip()

    def base(self, *, tar: bool) -> str:
        source, program = self.folder / "sh.c", self.folder / "sh"
        source.write_text(SHELL)
        subprocess.run(["cc", "-static", "-o", program, source], check=True)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(program, "bin/sh")
            for path in program_and_libraries("tar") if tar else ():
                archive.add(Path(path).resolve(), path)
        self.made.append(self("import", "-", stdin=buffer.getvalue()))
        return self.made[-1]

    def build(self, lines: list[str], files: dict[str, str]) -> str:
        context = self.folder / f"context{len(self.made)}"
        for name, text in files.items():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            (context / name).write_text(text)
        (context / "Dockerfile").write_text("\n".join(lines))
        written = context / "id"
        self("build", "--quiet", "--iidfile", str(written), str(context))
        self.made.append(written.read_text())
        return self.made[-1]

    def layers(self, image: str) -> list[str]:
        told: list[str] = json.loads(self("image", "inspect", image))[0]["RootFS"]["Layers"]
        return told


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = Engine(tmp_path_factory.mktemp("engine"))
    if not made.client:
        pytest.skip("needs a Docker engine: there is no client")
    asked = subprocess.run([made.client, "version"], capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"needs a Docker engine: {asked.stderr.strip().splitlines()[-1]}")
    yield made
    for image in reversed(made.made):
        subprocess.run([made.client, "rmi", "--force", image], capture_output=True, check=False)


@pytest.fixture(scope="module", params=["with tar", "without tar"])
def base(engine: Engine, request: pytest.FixtureRequest) -> str:
    """An image to build on; with tar its layers are read one by one, without it as docker saves
    them."""
    name = f"credentials-test-{secrets.token_hex(4)}"
    engine("tag", engine.base(tar=request.param == "with tar"), name)
    engine.made.append(name)
    return name


@pytest.mark.container
def test_every_place_of_an_image_is_looked_into(engine: Engine, base: str) -> None:
    values = [token() for _ in range(8)]
    lines = [
        f"FROM {base}",
        f"ARG BUILD_TOKEN={values[0]}",
        "RUN make",
        f"ENV MY_SETTING={values[1]}",
        f"LABEL note={values[2]}",
        "COPY lower/ /srv/",
        'RUN ["/bin/sh", "/srv/removed.txt"]',
        "COPY upper/ /srv/",
        f'CMD ["serve", "{values[5]}"]',
        f'ENTRYPOINT ["{values[6]}"]',
    ]
    files = {
        "lower/removed.txt": values[3],
        "lower/.netrc": f"machine x.invalid password {values[7]}\n",
        "lower/fine.txt": "nothing\n",
        "upper/notes.txt": f"mine: {values[4]}\n",
    }
    image = engine.build(lines, files)
    found = search_image(engine.client, image, engine.layers(base))
    places = {one.where for one in found}
    own = [one for one in found if one.path]
    assert {one.path for one in own} == {"/srv/removed.txt", "/srv/.netrc", "/srv/notes.txt"}
    assert {"variable MY_SETTING", "label note", "Cmd", "Entrypoint"} <= places
    assert any("of the history" in place for place in places)
    last = len(engine.layers(image))
    assert f"/srv/notes.txt in layer {last} of {last}" in places
    told = listed(found, most=100) + repr(found)
    assert not any(value in told for value in values)


@pytest.mark.container
def test_the_same_image_without_them_holds_none(engine: Engine, base: str) -> None:
    lines = [
        f"FROM {base}",
        "ARG BUILD_TOKEN=",
        "RUN make",
        "ENV MY_SETTING=x",
        "LABEL note=y",
        "COPY upper/ /srv/",
        'CMD ["serve"]',
    ]
    image = engine.build(lines, {"upper/notes.txt": "nothing\n", "upper/.bashrc": "alias l=ls\n"})
    assert search_image(engine.client, image) == []


@pytest.mark.container
def test_layers_of_the_base_are_left_out_and_its_configuration_is_not(
    engine: Engine, base: str
) -> None:
    lines = [f"FROM {base}", f"ENV HF_TOKEN={token()}", "COPY lower/ /srv/"]
    image = engine.build(lines, {"lower/.netrc": "machine x.invalid password y\n"})
    assert len(search_image(engine.client, image)) == 3
    found = search_image(engine.client, image, engine.layers(image))
    assert {one.path for one in found} == {""}
    assert "variable HF_TOKEN" in {one.where for one in found}


@pytest.mark.container
def test_a_commit_is_looked_into(engine: Engine, base: str) -> None:
    container = engine("create", "--env", f"HF_TOKEN={token()}", base, "/bin/sh")
    archive = layer({"srv/id": private_key()})
    engine("cp", "-", f"{container}:/", stdin=archive.getvalue())
    image = engine("commit", "--message", f"with {token('ghp_')}", container)
    engine.made.append(image)
    engine("rm", container)
    found = search_image(engine.client, image, engine.layers(base))
    assert {(one.kind, one.where) for one in found} >= {
        ("Hugging Face token", "variable HF_TOKEN"),
        ("private key", "/srv/id in layer 2 of 2"),
        ("GitHub token", "step 2 of the history"),
    }


@pytest.mark.container
def test_of_an_image_with_tar_only_its_own_layers_are_read(
    engine: Engine, base: str, request: pytest.FixtureRequest
) -> None:
    if engine("info", "--format", "{{.Driver}}") != "overlay2":
        pytest.skip("the engine keeps layers elsewhere than in folders: needs overlay2")
    client = engine.folder / "client-without-save"
    client.write_text(f'#!/bin/sh\n[ "$1" = save ] && exit 1\nexec {engine.client} "$@"\n')
    client.chmod(0o755)
    image = engine.build([f"FROM {base}", "COPY x /srv/x"], {"x": token()})
    if "without tar" in request.node.name:
        with pytest.raises(WorkspaceError, match="docker save failed"):
            search_image(str(client), image)
    else:
        (found,) = search_image(str(client), image, engine.layers(base))
        assert found.where == "/srv/x in layer 2 of 2"


@pytest.mark.container
def test_an_image_that_is_not_there_is_said(engine: Engine) -> None:
    with pytest.raises(
        WorkspaceError, match=r"could not be searched for credentials: .*no-such-image"
    ):
        search_image(engine.client, "no-such-image:at-all")


@pytest.fixture
def saved(engine: Engine, base: str) -> tuple[bytes, list[str]]:
    """`docker save` of an image with a token in its last layer, and the base's layers."""
    image = engine.build([f"FROM {base}", "COPY x /srv/x"], {"x": token()})
    result = subprocess.run([engine.client, "save", image], capture_output=True, check=True)
    return result.stdout, engine.layers(base)


@pytest.mark.container
def test_a_stream_that_breaks_off_is_never_taken_for_clean(
    saved: tuple[bytes, list[str]],
) -> None:
    stream, _ = saved
    size = len(stream)
    for kept in (0, 100, 512, size // 3, size // 2 // 512 * 512, size * 9 // 10):
        with pytest.raises(WorkspaceError, match="not a whole image"):
            search_saved_image(io.BytesIO(stream[:kept]))


def as_oci(stream: bytes, *, compress: bool) -> bytes:
    """The same image as engines from release 25 on write it: blobs by digest."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        for member in archive:
            if member.isreg():
                file = archive.extractfile(member)
                assert file
                files[member.name] = file.read()
    (manifest,) = json.loads(files["manifest.json"])
    blobs: dict[str, str | bytes] = {}

    def blob(content: bytes) -> str:
        name = f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
        blobs[name] = content
        return name

    named = {
        "Config": blob(files[manifest["Config"]]),
        "Layers": [
            blob(gzip.compress(files[name]) if compress else files[name])
            for name in manifest["Layers"]
        ],
    }
    return layer({**blobs, "manifest.json": json.dumps([named])}).getvalue()


@pytest.mark.container
@pytest.mark.parametrize("compress", [False, True])
def test_an_archive_of_a_newer_engine_is_read_as_well(
    saved: tuple[bytes, list[str]], compress: bool
) -> None:
    stream, of_base = saved
    before = search_saved_image(io.BytesIO(stream), of_base)
    assert len(before) == 1
    assert search_saved_image(io.BytesIO(as_oci(stream, compress=compress)), of_base) == before
