# SPDX-License-Identifier: Apache-2.0
"""Find credentials in what becomes an image, and in an image: variables, files, layers, history.

Standard library only: this runs on the host, before there is an environment. What is found is
named by its place and kind; the value itself is in no finding, message or exception.

Not seen: what is encrypted or compressed (objects in a git repository, archives within a layer),
and binaries above a megabyte, which are compiled code and weights. Nor a password that is a
word, or a word with a number behind it, where the file is none of the user's settings.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import string
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

from workspace.host.errors import WorkspaceError


@dataclass(frozen=True)
class Finding:
    """A credential, by place and kind."""

    where: str
    kind: str
    path: str = ""
    """The file's absolute path; empty where it is no file."""
    scrubbed: bool = False
    """A tool makes it anew when it is missing, so it may be removed without asking."""

    def __str__(self) -> str:
        return f"{self.kind} in {self.where}"


def listed(found: Iterable[Finding], most: int = 8) -> str:
    """Findings as part of one line."""
    lines = [str(finding) for finding in found]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return ", ".join(lines[:most] + more)


# --- what a credential looks like ----------------------------------------------------------------

# (kind, how it looks). The formats are public: their owners document them, and rule sets for
# scanners list them. In each are 20 characters of `_IN_A_RUN` in a row.
_SHAPES = [
    # Models and their hosts
    ("Hugging Face token", r"hf_[A-Za-z0-9]{30,}"),
    ("Hugging Face token", r"api_org_[A-Za-z0-9]{30,}"),
    ("API key", r"sk-(?:proj|svcacct|service|admin|ant|or|lf)-(?=[a-z_-]*[A-Z\d])[\w-]{20,}"),
    ("API key", r"sk-(?=[a-z]*[A-Z\d])[A-Za-z0-9]{32,}(?!-)"),
    ("NVIDIA API key", r"nvapi-[\w-]{40,}"),
    ("Groq API key", r"gsk_[A-Za-z0-9]{52}"),
    ("xAI API key", r"xai-\w{70,}"),
    ("Perplexity API key", r"pplx-[A-Za-z0-9]{40,}"),
    ("Replicate token", r"r8_[\w-]{37}"),
    ("Together API key", r"tgp_v1_[\w-]{40,}"),
    ("Fireworks API key", r"fw_(?=\w*[a-z])(?=\w*[A-Z])[A-Za-z0-9]{22,}"),
    ("Cerebras API key", r"csk-[a-z0-9]{40,}"),
    ("Anyscale token", r"esecret_[A-Za-z0-9]{20,}"),
    ("Modal token", r"a[ks]-[A-Za-z0-9]{22}"),
    ("RunPod API key", r"rpa_[A-Z0-9]{40,}"),
    ("Friendli token", r"flp_[A-Za-z0-9]{40,}"),
    ("Pinecone API key", r"pcsk_[A-Za-z0-9]{5,6}_[A-Za-z0-9]{60,}"),
    ("LangSmith API key", r"lsv2_[ps][tk]_[a-f0-9]{32}_[a-f0-9]{10}"),
    ("Tavily API key", r"tvly-(?:dev-|prod-)?(?=[a-z-]*[A-Z\d])[A-Za-z0-9-]{30,}"),
    ("ElevenLabs API key", r"sk_[a-f0-9]{48}"),
    ("Voyage API key", r"pa-(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[\w-]{43}(?!-)"),
    ("Jina API key", r"jina_[a-f0-9]{32}[\w-]{20,}"),
    ("Weights & Biases key", r"wandb_v1_[\w-]{40,}"),
    ("Kaggle token", r"KGAT_[a-f0-9]{32}"),
    # Clouds
    ("AWS access key", r"A(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16}"),
    ("AWS Bedrock key", r"ABSK[A-Za-z0-9+/]{100,}"),
    ("Google API key", r"AIza[\w-]{35}(?!-)"),
    ("Google OAuth secret", r"GOCSPX-[\w-]{28}"),
    ("Google OAuth token", r"ya29\.[\w-]{30,}"),
    ("Google OAuth token", r"1//0[\w-]{40,}"),
    ("Google storage key", r"GOOG1E[A-Z0-9]{50,}"),
    ("Azure key", r"[A-Za-z0-9]{52}JQQJ9[A-Za-z0-9]{27}"),
    ("Azure client secret", r"[\w.~]{3}\dQ~[\w.~-]{31,34}"),
    ("Azure signature", r"sig=(?=[a-z_-]*[A-Z\d])[\w%+/=-]{40,}"),
    ("Azure DevOps token", r"[A-Za-z0-9]{76}AZDO[A-Za-z0-9]{4}"),
    ("Azure registry password", r"[A-Za-z0-9+/]{42}\+ACR[A-Za-z0-9]{6}"),
    ("Alibaba access key", r"LTAI[A-Za-z0-9]{17,21}"),
    ("Tencent access key", r"AKID[A-Za-z0-9]{32}"),
    ("Yandex API key", r"AQVN[\w-]{35,38}(?!-)"),
    ("DigitalOcean token", r"do[opr]_v1_[a-f0-9]{64}"),
    ("Cloudflare token", r"cf(?:[uat]t|k)_[A-Za-z0-9]{40}[a-f0-9]{8}"),
    ("Cloudflare key", r"v1\.0-[a-f0-9]{24}-[a-f0-9]{146}"),
    ("Heroku API key", r"HRKU-AA[\w-]{58}"),
    ("Fly.io token", r"fo1_[\w-]{43}"),
    ("Fly.io token", r"fm\d[ar]?_[\w+/=-]{100,}"),
    ("Scalingo token", r"tk-us-[\w-]{48}"),
    ("Render API key", r"rnd_[A-Za-z0-9]{28,}"),
    ("Netlify token", r"nf[bcopu]_[A-Za-z0-9]{36,}"),
    ("Supabase token", r"sbp_[a-f0-9]{40}"),
    ("Supabase key", r"sb_secret_[\w-]{30,}"),
    ("PlanetScale password", r"pscale_(?:tkn|oauth|pw)_[\w.=-]{32,64}"),
    ("Neon API key", r"napi_[a-z0-9]{60,}"),
    ("Databricks token", r"dapi[a-f0-9]{32}"),
    ("MongoDB Atlas secret", r"mdb_sa_sk_[\w-]{40,}"),
    ("ClickHouse key", r"4b1d[A-Za-z0-9]{38}"),
    ("Aiven password", r"AVNS_[\w-]{19}"),
    ("Confluent secret", r"cflt[A-Za-z0-9+/]{60}"),
    ("Pulumi token", r"pul-[a-f0-9]{40}"),
    ("Terraform token", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,70}"),
    ("Vault token", r"hv[bsr]\.[\w-]{24,}"),
    ("Doppler token", r"dp\.(?:ct|pt|st|sa|scim|audit)\.(?:[\w-]{2,35}\.)?[A-Za-z0-9]{40,44}"),
    ("1Password token", r"ops_eyJ[A-Za-z0-9+/]{200,}"),
    ("1Password key", r"A3-[A-Z0-9]{6}-[A-Z0-9]{6}-?[A-Z0-9]{5}(?:-[A-Z0-9]{5}){3}"),
    ("age key", r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    ("Tailscale key", r"tskey-[a-z]+-[A-Za-z0-9]+-[A-Za-z0-9]{20,}"),
    ("OpenShift token", r"sha256~[\w-]{43}(?!-)"),
    ("Octopus API key", r"API-[A-Z0-9]{26}"),
    ("Harness token", r"[ps]at\.[\w-]{22}\.[A-Za-z0-9]{24}\.[A-Za-z0-9]{20}"),
    # Code, packages, continuous integration
    ("GitHub token", r"gh[opsur]_[A-Za-z0-9]{36,}"),
    ("GitHub token", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    (
        "GitLab token",
        r"gl(?:pat|dt|ft|rt|rtr|ptt|cbt|soat|imt|agent|oas|ffct)-(?=[a-z_-]*[A-Z\d])[\w.-]{20,}",
    ),
    ("GitLab token", r"GR1348941[\w-]{20}"),
    ("Bitbucket token", r"ATBB[A-Za-z0-9]{32}"),
    ("Bitbucket token", r"BBDC-[\w+/@-]{40,50}"),
    ("Atlassian token", r"AT(?:ATT3|CTT3)[\w=+/-]{100,}"),
    ("npm token", r"npm_[A-Za-z0-9]{36}"),
    ("PyPI token", r"pypi-AgE[\w-]{50,}"),
    ("RubyGems key", r"rubygems_[a-f0-9]{48}"),
    ("crates.io token", r"cio[A-Za-z0-9]{32}"),
    ("NuGet key", r"oy2[a-z0-9]{43}"),
    ("Clojars token", r"CLOJARS_[a-f0-9]{60}"),
    ("Deno token", r"dd[pw]_[A-Za-z0-9]{36}"),
    ("Packagist token", r"packagist_[a-z]{3}_[a-f0-9]{60,}"),
    ("Docker Hub token", r"dckr_[op]at_[\w-]{20,}"),
    ("Artifactory key", r"AKCp[A-Za-z0-9]{69}"),
    ("Artifactory token", r"cmVmd[A-Za-z0-9]{59}"),
    ("CircleCI token", r"CCIP(?:AT|RJ)_[A-Za-z0-9]{22}_[a-f0-9]{40}"),
    ("Buildkite token", r"bk[aur]a_[a-z0-9]{40}"),
    ("Sonar token", r"sq[apu]_[a-f0-9]{40}"),
    ("Sourcegraph token", r"sgp_(?:[a-f0-9]{16}_|local_)?[a-f0-9]{40}"),
    ("Prefect key", r"pn[ub]_[A-Za-z0-9]{36}"),
    ("Infracost key", r"ico-[A-Za-z0-9]{32}"),
    # Payment
    ("Stripe key", r"[rs]k_(?:live|test|prod)_[A-Za-z0-9]{16,}"),
    ("Stripe webhook secret", r"whsec_[A-Za-z0-9+/]{32,}"),
    ("Square token", r"sq0(?:atp|csp)-[\w-]{22,}"),
    ("Square token", r"EAAA(?=[\w-]*\d)[\w-]{60}(?!-)"),
    ("Braintree token", r"access_token\$(?:production|sandbox)\$[a-z0-9]{16}\$[a-f0-9]{32}"),
    ("Razorpay key", r"rzp_(?:live|test)_[A-Za-z0-9]{14}"),
    ("Flutterwave key", r"FLWSECK(?:_TEST)?-[a-z0-9]{12,}"),
    ("Plaid token", r"access-(?:sandbox|development|production)-[a-f0-9-]{36}"),
    ("Shopify token", r"shp(?:at|ca|pa|ss|ua)_[A-Fa-f0-9]{32}"),
    ("Shippo token", r"shippo_(?:live|test)_[a-f0-9]{40}"),
    ("EasyPost key", r"EZ[AT]K[A-Za-z0-9]{54}"),
    ("Duffel token", r"duffel_(?:live|test)_[\w=-]{43}"),
    ("GoCardless token", r"live_(?=[a-z_-]*[A-Z\d])[\w-]{40}(?!-)"),
    ("Lob or Mollie key", r"live_(?=[a-z]*[A-Z\d])[A-Za-z0-9]{30,35}"),
    ("Lob or Mollie key", r"test_(?=[a-z]*[A-Z\d])[A-Za-z0-9]{30,35}"),
    ("Pagar.me key", r"ak_live_[A-Za-z0-9]{30}"),
    ("Ramp secret", r"ramp_sec_[A-Za-z0-9]{48}"),
    # Mail and telephone
    ("SendGrid key", r"SG\.[\w-]{20,24}\.[\w-]{39,50}"),
    ("Mailgun key", r"key-[a-f0-9]{32}"),
    ("Mailgun key", r"[a-f0-9]{32}-[a-f0-9]{8}-[a-f0-9]{8}(?!-)"),
    ("Mailchimp key", r"[a-f0-9]{32}-us\d{1,2}"),
    ("Mandrill key", r"md-(?=[a-z_-]*[A-Z\d])[\w-]{22}(?!-)"),
    ("Brevo key", r"x(?:keysib|smtpsib)-[a-f0-9]{64}-[A-Za-z0-9]{16}"),
    ("Resend key", r"re_[A-Za-z0-9]{8}_[A-Za-z0-9]{24}"),
    ("Twilio key", r"SK[a-f0-9]{32}"),
    ("Telnyx key", r"KEY[A-F0-9]{32}_[A-Za-z0-9]{22}"),
    ("Klaviyo key", r"pk_(?:[A-Za-z0-9]{6}_)?[a-f0-9]{34}"),
    ("OneSignal key", r"os_v2_(?:app|org)_[a-z0-9]{50,}"),
    # Chat
    ("Slack token", r"xox[a-z]-(?=[a-z-]*[A-Z\d])[\w-]{10,}"),
    ("Slack token", r"xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]{30,}"),
    ("Slack webhook", r"hooks\.slack\.com/(?:services|workflows|triggers)/\w+/\w+/[\w/]{20,}"),
    ("Discord token", r"[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}"),
    ("Discord webhook", r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]{60,}"),
    ("Telegram token", r"bot\d{8,10}:AA[\w-]{33}(?!-)"),
    ("Telegram token", r"\d{8,10}:AA[\w-]{33}(?!-)"),
    ("Teams webhook", r"webhook\.office\.com/webhookb2/[\w@-]{36,}/IncomingWebhook/[a-f0-9]{32}"),
    ("WeCom webhook", r"qyapi\.weixin\.qq\.com/cgi-bin/webhook/send\?key=[a-f0-9-]{36}"),
    ("Feishu webhook", r"open\.(?:feishu\.cn|larksuite\.com)/open-apis/bot/v2/hook/[a-f0-9-]{36}"),
    ("Zapier webhook", r"hooks\.zapier\.com/hooks/catch/[A-Za-z0-9/]{12,}"),
    ("Matrix token", r"syt_[\w=]+_[A-Za-z]{20}_\w{6}"),
    # Monitoring
    ("Grafana token", r"glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}"),
    ("Grafana token", r"glc_[A-Za-z0-9+/]{32,}"),
    ("Grafana key", r"eyJrIjoi[A-Za-z0-9]{70,}"),
    ("New Relic key", r"NR(?:AK|RA|JS|II|IQ|BR)-[\w-]{19,}"),
    ("Dynatrace token", r"dt0[a-z]\d\d\.[A-Za-z0-9]{24}\.[A-Za-z0-9]{64}"),
    ("Sentry token", r"sntryu_[a-f0-9]{64}"),
    ("Sentry token", r"sntrys_eyJ[\w+/=]{60,}"),
    ("Honeycomb key", r"hc[a-z]i[ck]_[a-z0-9]{58}"),
    ("PostHog key", r"phx_\w{43,}"),
    ("LaunchDarkly key", r"sdk-[a-f0-9]{8}-[a-f0-9]{4}-4[a-f0-9]{3}-[a-f0-9]{4}-[a-f0-9]{12}"),
    ("LaunchDarkly key", r"api-[a-f0-9]{8}-[a-f0-9]{4}-4[a-f0-9]{3}-[a-f0-9]{4}-[a-f0-9]{12}"),
    ("Rootly key", r"rootly_[a-f0-9]{64}"),
    # Other services
    ("JSON web token", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ("Adafruit key", r"aio_[A-Za-z0-9]{28}"),
    ("Adobe secret", r"p8e-[\w-]{32}(?!-)"),
    ("Airtable token", r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}"),
    ("Apify token", r"apify_api_[A-Za-z0-9]{36}"),
    ("Asana token", r"\d/\d{16}(?:/\d{16})?:[a-f0-9]{32}"),
    ("Contentful token", r"CFPAT-[\w-]{43}"),
    ("Dropbox token", r"sl\.[\w-]{130,}"),
    ("Facebook token", r"EAA[B-Z](?=[a-z]*[A-Z\d])[A-Za-z0-9]{96,}"),
    ("Figma token", r"fig[a-z]{1,2}_[\w=-]{40,}"),
    ("Frame.io token", r"fio-u-[\w=-]{64}"),
    ("HubSpot token", r"pat-(?:na|eu)\d-[a-f0-9]{8}(?:-[a-f0-9]{4}){3}-[a-f0-9]{12}"),
    ("Intra 42 secret", r"s-s4t2(?:ud|af)-[a-f0-9]{64}"),
    ("Linear key", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}"),
    ("Mapbox token", r"sk\.eyJ[\w-]{40,}\.[\w-]{20,}"),
    ("MaxMind key", r"[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk"),
    ("Notion token", r"ntn_\d{11}[A-Za-z0-9]{35}"),
    ("Notion token", r"secret_(?=[a-z]*[A-Z\d])[A-Za-z0-9]{43}"),
    ("Postman key", r"PMAK-[a-f0-9]{24}-[a-f0-9]{34}"),
    ("ReadMe token", r"rdme_[a-z0-9]{70}"),
    ("Salesforce token", r"00[A-Za-z0-9]{13}![\w.]{90,}"),
    ("SettleMint token", r"sm_[aps]at_[A-Za-z0-9]{16}"),
    ("Twitter token", r"A{20}[A-Za-z0-9%]{60,}"),
    ("Typeform token", r"tfp_[\w.=-]{40,}"),
    ("Zoho token", r"1000\.[a-f0-9]{32}\.[a-f0-9]{32}"),
    ("Zuplo key", r"zpka_[a-z0-9]{32}_[a-z0-9]{8}"),
]


def _any_shape() -> re.Pattern[bytes]:
    """All of them, by their first character: so most are passed over at once, in half the time."""
    by_first: dict[str, list[str]] = {}
    for _, shape in _SHAPES:
        plain = re.match(r"[A-Za-z0-9](?![{?*+])", shape)
        by_first.setdefault(plain[0] if plain else "", []).append(shape[1 if plain else 0 :])
    parts = "|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in by_first.items())
    # A character before it comes first, because a search for one of a set is fast.
    return re.compile(rf"\W(?:(?<=\\)[nrt])?({parts})(?!\w)".encode(), re.ASCII)


_SHAPE = _any_shape()
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    rb"(?:\s|\\[nr])*(?:[\w-]+: [^\n]*\n\s*)*[A-Za-z0-9+/=]{16}"
)
_ADDRESS = re.compile(
    # A reference to a variable is no value; a long user with digits and no password is a token.
    rb"[a-z]://(?:[^\s/:@\"'`<>]*:(?![$<{*%])(?P<password>[^\s/@\"'`<>]+)"
    rb"|(?=[^\s/:@]*\d)[\w-]{20,})@[\w\[]",
    re.ASCII,
)
# Base64, which has no long run where it has many slashes.
_ACCOUNT_KEY = re.compile(rb"Key=(?P<password>[A-Za-z0-9+/]{42,}={0,2})")
_CONDA_TOKEN = re.compile(rb"://[^\s\"']*/t/(?!<)[\w-]{8,}/", re.ASCII)
_REGISTRY_LOGIN = re.compile(rb"auth\\?\"\s*:\s*\\?\"([A-Za-z0-9+/]{8,}={0,2})")
_NAME = re.compile(
    r"\w*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE)\w*|"
    r"(?:\w*_)?(?:PASS|PAT|CREDENTIALS?|AUTH|AUTH_?CONFIG)|\w*_PWD|(?-i:[pP]wd)|"
    r"\w*_?AUTH_?TOKEN|\w*TOKEN(?:_\d+)?|"
    r"\w*(?:API|ACCESS|PRIVATE|MASTER|ENCRYPTION|SIGNING|DEPLOY|ACCOUNT|ADMIN|STORAGE|SHARED|AUTH|"
    r"SUBSCRIPTION|SERVICE)_?KEY(?:_ID|_DATA|_\d+)?|"
    r"CLIENT_KEY_DATA|SSH_KEY",
    re.IGNORECASE | re.ASCII,
)
_NAME_OF_SOMETHING_ELSE = re.compile(
    r"GOOGLE_APPLICATION_CREDENTIALS|"
    r".*_(?:FILE|PATH|DIR|FOLDER|NAME|PROVIDER|HELPER|SOCK|ENDPOINT|TYPE|TTL|EXPIRES?|STDIN)",
    re.IGNORECASE,
)
# What the name of a credential, or a command that takes one, cannot do without.
_HINTS = ("secret", "pass", "token", "key", "pwd", "auth", "cred", "_pat", "login", "user", " -u ")
_NO_VALUE = re.compile(
    r"[\"']?(?:|[$<{*].*|true|false|yes|no|on|off|none|null|\d{1,8}|x+|\.+)[\"']?",
    re.IGNORECASE | re.DOTALL,
)
_EXAMPLE = re.compile(
    r"example|placeholder|change.?(?:me|it)|your[\W_]|dummy|redacted|12345678|abcdef|x{6}|\*{3}",
    re.IGNORECASE,
)
_REFERENCE = re.compile(
    r"[$%~!@].*|.*[\s\\(){}\[\]<>`].*|.*://.*|(?:vault|env|file|arn|op|ref|sha\d+|md5):.*",
    re.DOTALL,
)
_WORD = r"(?:(?:[A-Z]?[a-z]{2,}+|[A-Z]{2,}+)++\d{0,3}|\d{1,3}|[A-Za-z]\d?)"
_WORDS_AND_NUMBERS = re.compile(rf"[\W_]*{_WORD}(?:[\W_]+{_WORD})*")
_ASSIGNMENT = re.compile(
    # <add key="name" value="value"/>
    r"""(?:key|name)=["'](?P<key>\w[\w-]*)["']\s+value=(?P<entry>"[^"\n]*"|'[^'\n]*')"""
    # A line of a shell, TOML, INI, YAML, JSON, XML, .npmrc or .netrc. Within a line of a command,
    # `A= b` gives A nothing. A value may be a line of its own kind: "Server=db;Password=...".
    r"""|(?:(^[ \t]*)|(?<=[\s"'`.:/;|&?(\[{<,-]))_?(?P<name>\w[\w-]*)["'\]]{0,2}"""
    r"""(?:(?(3)[ \t]*(?:=>|:=|[:=])[ \t]*|(?:[ \t]*(?::|=>|:=)[ \t]*|[ \t]+=[ \t]*|[=>]))"""
    r"""|(?<=password)[ \t]+)(?=(?P<value>"[^"\n]{,999}"|'[^'\n]{,999}'|[^\s"',;&<]{1,999}))"""
    # An option of a command.
    r"""|(?<=\s)--?(?P<option>\w[\w-]*)(?:=|[ ]+)(?P<given>"[^"\n]*"|'[^'\n]*'|[^\s"'-][^\s"']*)""",
    re.MULTILINE | re.ASCII,
)
_AUTHORIZATION = re.compile(
    r"authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+([^\s$\"'<{]{8,})", re.I
)
_LOGIN = re.compile(
    r"\s(?:-u|--user)[ =][\"']?[^\s:\"'$]+:([^\s\"'$]+)|\blogin\s.*\s-p[ =]?[\"']?([^\s\"'$]+)"
)


def _made_up(value: str) -> bool:
    """Whether a value stands for one that everybody has to fill in."""
    return bool(_EXAMPLE.search(value)) or len(set(value)) < min(8, len(value) // 2)


def _drawn(value: str, least: int) -> bool:
    """Whether a value looks like one that a generator drew: no word, reference, path, version."""
    return (
        len(value) >= least
        and not (value.isalpha() or _REFERENCE.fullmatch(value) or _made_up(value))
        and bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value))
        and not _WORDS_AND_NUMBERS.fullmatch(value)
    )


def _named(name: str, value: str) -> bool:
    """Whether a setting is a credential by its name."""
    name = re.sub(r"[.\-/]", "_", name)
    return bool(
        _NAME.fullmatch(name)
        and not _NAME_OF_SOMETHING_ELSE.fullmatch(name)
        and not _NO_VALUE.fullmatch(value.strip())
        and not _EXAMPLE.search(value)
    )


def _assignments(text: str, *, quoted: bool = False) -> Iterator[tuple[str, str]]:
    """Names and values in a command, a file of settings, or (`quoted`) a source."""
    for match in _ASSIGNMENT.finditer(text.replace('\\"', '"')):
        value = match["value"] or match["given"] or match["entry"]
        if not quoted or value[0] in "\"'":
            yield match["name"] or match["option"] or match["key"], value.strip("\"'")


def _given(text: str, least: int, *, quoted: bool = False) -> bool:
    """Whether a text gives somewhere to a name of a credential what only a credential is like."""
    for line in text.splitlines():
        lower = line.lower()
        if not any(hint in lower for hint in _HINTS):
            continue
        for pattern in (_AUTHORIZATION, _LOGIN):
            if any(_drawn(match[match.lastindex or 0], least) for match in pattern.finditer(line)):
                return True
        for name, value in _assignments(line, quoted=quoted):
            if _named(name, value) and _drawn(value, least):
                return True
    return False


_LETTERS = (string.ascii_letters + string.digits).encode()
_IN_A_RUN, _IN_A_WORD = (
    bytes(ord("a") if one in _LETTERS + signs else ord(" ") for one in range(256))
    for signs in (b"_-~%+", b"_-~%+./=:|!&?@#$*^")
)
_RUN = b"a" * 20
# Letters and digits; or one of those of which some hold no digit.
_MIXED = re.compile(
    rb"[\W\d_]*(?:[A-Za-z][^\d]*\d|\d[\W\d_]*[A-Za-z])|"
    rb"n?(?:hf_|gh[opsur]_|gl[a-z]+-|npm_|sk-|A(?:KIA|SIA|BIA|CCA|Iza)|GOCSPX-)",
    re.ASCII,
)
_BEFORE, _AFTER = 200, 4096


def _words(content: bytes) -> Iterator[tuple[int, int]]:
    """Where a credential may be: words with 20 letters and digits in a row, and some of both.

    Two translations and `find` pass over most of a text ten times as fast as a regular expression
    does that has so many beginnings.
    """
    runs, words = content.translate(_IN_A_RUN), content.translate(_IN_A_WORD)
    at = runs.find(_RUN)
    while at >= 0:
        end = runs.find(b" ", at)
        end = len(content) if end < 0 else end
        if _MIXED.match(content, at, end):
            first, last = max(0, at - _BEFORE), min(len(content), end + _AFTER)
            start = words.rfind(b" ", first, at) + 1 or first
            end = words.find(b" ", end, last)
            end = last if end < 0 else end
            yield start, end
        at = runs.find(_RUN, end)


_BASE64 = re.compile(rb"[A-Za-z0-9+/]{200}")


def _within_base64(content: bytes, match: re.Match[bytes]) -> bool:
    """Whether a match lies in an encoded image or file: `/` and `+` make it look like a word, and
    100 kB of base64 hold what looks like a short token once in a few thousand times."""
    return match[0][:1] in (b"/", b"+") and any(
        _BASE64.fullmatch(content, begin, begin + 200)
        for begin in (match.start(1) - 200, match.end(1))
        if begin >= 0
    )


def _kind(value: bytes) -> str:
    return next(kind for kind, shape in _SHAPES if re.fullmatch(shape.encode(), value, re.ASCII))


def _at_mark(content: bytes, mark: bytes, pattern: re.Pattern[bytes], before: int) -> bool:
    """Whether a pattern is in a content, `before` characters before its mark; with a password, if
    the pattern has one, that nobody made up for an example."""
    at = content.find(mark)
    while at >= 0:
        if match := pattern.match(content, at - before):
            password = match.groupdict(b"").get("password")
            if password is None or _drawn(password.decode(errors="replace"), 8):
                return True
        at = content.find(mark, at + 1)
    return False


def _registry_login(content: bytes) -> bool:
    """Whether user and password for a registry are in it, as Docker, podman and helm keep them."""
    for match in _REGISTRY_LOGIN.finditer(content, content.find(b"auths")):
        with contextlib.suppress(ValueError):
            if re.fullmatch(rb"[\x21-\x7e]+:[\x21-\x7e]+", base64.b64decode(match[1])):
                return True
    return False


def _in_any_file(content: bytes, *, quoted: bool = False) -> str | None:
    """The kind of credential that is somewhere in this content, whatever it is, or None."""
    content = b"\n" + content
    if _at_mark(content, b"-----BEGIN ", _PRIVATE_KEY, 0):
        return "private key"
    if _at_mark(content, b"://", _ADDRESS, 1):
        return "password in an address"
    if _at_mark(content, b"Key=", _ACCOUNT_KEY, 0):
        return "Azure account key"
    if b"auths" in content and _registry_login(content):
        return "registry login"
    for start, end in _words(content):
        for match in _SHAPE.finditer(content, start - 1, end):
            if not (_made_up(match[1].decode()) or _within_base64(content, match)):
                return _kind(match[1])
        if quoted and content[start - 1 : start] not in (b'"', b"'"):
            continue
        if _WORDS_AND_NUMBERS.fullmatch(content[start:end].decode(errors="replace")):
            continue
        around = content[max(0, start - 80) : end + 2].decode(errors="replace")
        if _given(around, 16, quoted=quoted):
            return "credential"
    return None


def _shape_in_settings(content: bytes) -> str | None:
    """`_in_any_file`, and every password in an address: settings hold no examples."""
    if kind := _in_any_file(content):
        return kind
    if _ADDRESS.search(content) or _CONDA_TOKEN.search(content):
        return "password in an address"
    return None


def _in_text(text: str) -> str | None:
    """The kind of credential in a command or a file of settings, or None."""
    if kind := _shape_in_settings(text.encode(errors="surrogateescape")):
        return kind
    if _AUTHORIZATION.search(text):
        return "credential"
    if any(_named(name, value) for name, value in _assignments(text)) or _given(text, 6):
        return "credential"
    return None


def in_environment(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that are credentials by their name or by the shape of their value."""
    found = []
    for name, value in environment.items():
        kind = _in_text(value)
        if kind is None and _named(name, value):
            kind = "credential"
        if kind:
            found.append(Finding(f"variable {name}", kind))
    return found


# --- where credentials are kept ------------------------------------------------------------------

# Below any folder: of any user's home, of $HF_HOME, of the checkout.
_ALWAYS = [
    ("Hugging Face token", r"\.?huggingface/(?:token|stored_tokens)"),
    ("git's passwords", r"\.git-credentials|\.config/git/credentials|git/credential/.+"),
    ("passwords", r"[._]netrc|\.pgpass|\.mylogin\.cnf|\.password-store/.+|\.vault-token"),
    ("passwords", r"\.local/share/(?:keyrings|python_keyring|uv/credentials)/.+|\.authinfo"),
    ("SSH key", r"\.ssh/(?:id_[^/]*(?<!\.pub)|identity)|[^/]+\.ppk"),
    ("GnuPG keys", r"\.gnupg/(?:private-keys-v1\.d/.+|secring\.gpg)"),
    ("AWS credentials", r"\.aws/(?:credentials|(?:sso|cli)/cache/.+)"),
    (
        "Google Cloud credentials",
        r"\.config/gcloud/(?:credentials\.db|access_tokens\.db|legacy_credentials/.+|"
        r"application_default_credentials\.json)",
    ),
    (
        "Azure credentials",
        r"\.azure/(?:accessTokens\.json|msal_token_cache\.\w+|service_principal\S+)",
    ),
    ("package registry token", r"\.cargo/credentials(?:\.toml)?|\.gem/credentials"),
    ("Kaggle token", r"\.?kaggle/kaggle\.json"),
    ("conda token", r"(?:anaconda-client|binstar)/(?:tokens/.+|[^/]+\.token)|\.anaconda/keyring"),
    (
        "token",
        r"\.vscode(?:-server|-remote|-cli)?(?:-insiders)?/(?:cli/)?(?:\.\w+\.token|token(?:\.json)?)",
    ),
    (
        "token",
        r"\.terraform\.d/credentials\.tfrc\.json|\.(?:claude/\.credentials|codex/auth)\.json",
    ),
]
_SCRUBBED = [
    ("shell history", r"\.(?:bash|zsh|ksh|sh|ash)_history|\.histfile|\.zhistory|\.history"),
    ("shell history", r"fish/fish_history|xonsh/history_json/.+|powershell/PSReadLine/.+"),
    ("history", r"\.(?:python|node_repl|sqlite|psql|mysql|rediscli|irb|gdb|lldb)_history"),
    ("history", r"\.(?:viminfo|ipython/profile_\w+/history\.sqlite)|\.local/state/nvim/shada/.+"),
    (
        "Jupyter's runtime file",
        r"jupyter/runtime/(?:jupyter_cookie_secret|[^/]+\.(?:json|html))|jupyter/notebook_secret",
    ),
]
# Files of settings, which hold credentials or don't.
_SETTINGS = re.compile(
    r".*/(?:pip\.conf|pip\.ini|\.pypirc|uv\.toml|\.npmrc|\.yarnrc(?:\.yml)?|\.bunfig\.toml|\.?condarc|"
    r"\.env(?:\.[\w.-]+)?|\.envrc|\.gitconfig|\.git/(?:config|FETCH_HEAD|packed-refs|logs/.+)|"
    r"git/config|gh/hosts\.yml|hub|glab-cli/config\.yml|\.kube/config|\.docker/config\.json|"
    r"containers/auth\.json|wandb/settings|\.?ngc/config|\.modal\.toml|rclone\.conf|\.s3cfg|\.boto|"
    r"\.my\.cnf|\.wgetrc|\.curlrc|jupyter_(?:\w+_)?config\.(?:json|py)|config\.fish|"
    r"\.(?:bash|zsh|ksh|csh|tcsh)(?:rc|_profile|_login|env)|\.profile|\.zprofile|\.pam_environment|"
    r"direct_url\.json|[^/]+\.tfvars(?:\.json)?|[^/]+\.tfstate(?:\.backup)?|\.dockercfg|\.vault_pass|"
    r"\.terraformrc|gradle\.properties|\.m2/settings(?:-security)?\.xml|[Nn]u[Gg]et\.[Cc]onfig)"
    r"|/etc/(?:environment|pip\.conf|profile|bash\.bashrc|gitconfig|npmrc|profile\.d/.+|"
    r"apt/(?:auth\.conf(?:\.d/.+)?|sources\.list(?:\.d/.+)?|apt\.conf(?:\.d/.+)?))"
)
# Formats in which settings, and what was run with them, are written; any other file of the kind.
_MAYBE_SETTINGS = re.compile(
    r".*\.(?:tf|hcl|ya?ml|toml|ini|cfg|cnf|conf|config|properties|env|xml|json[5cl]?|plist|service|"
    r"php|sh|ps1|log)|.*/(?:Dockerfile[^/]*|[^./]+)"
)
# There a value is in quotes; what is not is an expression.
_SOURCE = re.compile(
    r".*\.(?:py|pyi|pyx|pxd|ipynb|c|cc|cpp|cxx|cu|cuh|h|hh|hpp|inl|[cm]?js|[jt]sx?|go|rs|java|rb|lua)"
)
_PASSWORD_HASH = re.compile(rb"^[^:\n]+:!?\$", re.MULTILINE)


def _places() -> tuple[re.Pattern[str], list[tuple[str, bool]]]:
    rules = [(kind, path, False) for kind, path in _ALWAYS]
    rules += [(kind, path, True) for kind, path in _SCRUBBED]
    parts = [f"(?P<place{number}>{path})" for number, (_, path, _) in enumerate(rules)]
    parts.append(f"(?P<place{len(rules)}>(?<=^/)(?:var/)?run/secrets/.+)")
    rules.append(("secret of a build or a service", "", False))
    return re.compile(f"(?:.*/)?(?:{'|'.join(parts)})"), [(kind, yes) for kind, _, yes in rules]


_PLACE, _PLACES = _places()


def _file(path: str, kind: str, *, scrubbed: bool = False) -> Finding:
    # A path may hold a value as well.
    shown = _SHAPE.sub(rb"/...", path.encode(errors="surrogateescape")).decode(errors="replace")
    return Finding(shown, kind, path, scrubbed)


def _at(path: str) -> Finding | None:
    """A finding for a file that its path alone tells."""
    match = _PLACE.fullmatch(path)
    if match is None:
        return None
    kind, scrubbed = _PLACES[int((match.lastgroup or "").removeprefix("place"))]
    return _file(path, kind, scrubbed=scrubbed)


def in_paths(paths: Iterable[str]) -> list[Finding]:
    """Files that are credentials by their absolute path, as `docker diff` tells them.

    Files of settings need their content: `in_tar` reads it.
    """
    return [finding for path in paths if (finding := _at(path))]


# --- what is in files ----------------------------------------------------------------------------

_CHUNK = 4 << 20
_OVERLAP = 8 << 10
_LARGE_BINARY = 1 << 20
_RECORD = re.compile(
    r"(.*/)(?:[^/]+\.dist-info/RECORD|conda-meta/[^/]+\.json)|(/)var/lib/dpkg/info/[^/]+\.md5sums"
)
"""What a package manager wrote about files it installed, and the folder they are named from."""
_MADE_FROM_SOURCE = re.compile(r".*/__pycache__/[^/]+\.pyc")
"""Python reads it only beside its source, and that is looked into."""


def _in_settings_file(path: str, content: bytes) -> str | None:
    text = content.decode(errors="surrogateescape")
    if path.endswith("direct_url.json"):
        return _shape_in_settings(content)
    return _in_text(text)


def _in_content(path: str, file: IO[bytes], size: int) -> tuple[str | None, bytes]:
    """The kind of credential in a file, or None; and its content, where it is one chunk."""
    content = first = file.read(_CHUNK)
    if size > _LARGE_BINARY and b"\0" in content[: 64 << 10]:
        return None, b""
    kind = None
    if path == "/etc/shadow" and _PASSWORD_HASH.search(content):
        kind = "password hash"
    elif _SETTINGS.fullmatch(path):
        kind = _in_settings_file(path, content)
    quoted = _SOURCE.fullmatch(path) is not None
    settings = not quoted and b"\0" not in content and _MAYBE_SETTINGS.fullmatch(path) is not None
    while content and kind is None:
        kind = _in_any_file(content, quoted=quoted)
        if settings and kind is None and _given(content.decode(errors="replace"), 6):
            kind = "credential"
        more = file.read(_CHUNK)
        content = content[-_OVERLAP:] + more if more else b""
    return kind, first if size <= _CHUNK else b""


def _as_released(path: str, content: bytes, records: Mapping[str, list[bytes]]) -> bool:
    """Whether a package manager installed this very file: a sample of the package's maker."""
    sha256 = hashlib.sha256(content)
    urlsafe = base64.urlsafe_b64encode(sha256.digest()).rstrip(b"=").decode()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    for folder, lists in records.items():
        if not path.startswith(folder):
            continue
        record = b"".join(lists)
        name = path[len(folder) :]
        wheel, debian = f"\n{name},sha256={urlsafe},", f"\n{md5}  {name}\n"
        conda = f'"{name}"', f'"{sha256.hexdigest()}"'
        if wheel.encode() in record or debian.encode() in record:
            return True
        if all(part.encode() in record for part in conda):
            return True
    return False


def in_tar(stream: IO[bytes]) -> list[Finding]:
    """Credentials in a layer, or another tar stream: by path, and in the content of every file.

    Samples that a package brings along (a test's private key) are none where the package's own
    list (RECORD of a wheel, of conda, of Debian) has the file with this very hash.

    Raises:
        tarfile.TarError: this is no tar stream, or only a part of one.
    """
    found: list[Finding] = []
    samples: list[tuple[Finding, bytes]] = []
    records: dict[str, list[bytes]] = {}
    with tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 20) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every one
            path = "/" + member.name.removeprefix("./").lstrip("/")
            linked = member.islnk()
            if not (linked or (member.isreg() and member.size)) or "/.wh." in path:
                continue
            if _MADE_FROM_SOURCE.fullmatch(path):
                continue
            if finding := _at(path):
                found.append(finding)
                continue
            file = None if linked else archive.extractfile(member)
            if file is None:
                continue
            if record := _RECORD.fullmatch(path):
                folder = record[1] or record[2]
                lines = file.read().replace(b"\r\n", b"\n")
                records.setdefault(folder, [b"\n"]).append(lines)
                continue
            kind, content = _in_content(path, file, member.size)
            if kind is None:
                continue
            finding = _file(path, kind)
            if content:
                samples.append((finding, content))
            else:
                found.append(finding)
        _expect_its_end(archive)
    found += [one for one, content in samples if not _as_released(one.path, content, records)]
    return found


def _expect_its_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end, and would leave the rest unread."""
    rest: Any = archive.fileobj
    while chunk := rest.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("damaged")


# --- an image ------------------------------------------------------------------------------------


def _in_document(document: Any, place: str, found: list[Finding]) -> None:
    """Every text in an image's configuration."""
    if isinstance(document, str):
        if kind := _in_text(document):
            found.append(Finding(place, kind))
    elif isinstance(document, list):
        for number, one in enumerate(document, 1):
            _in_document(
                one, f"step {number} of the history" if place == "history" else place, found
            )
        if all(isinstance(one, str) for one in document):
            _in_document(" ".join(document), place, found)
    elif isinstance(document, dict):
        for key, value in document.items():
            if key == "Env":
                pairs = (pair.partition("=") for pair in value or [])
                found += in_environment({name: value for name, _, value in pairs})
            elif key == "Labels":
                for finding in in_environment(value or {}):
                    found.append(
                        replace(finding, where=finding.where.replace("variable", "label", 1))
                    )
            else:
                named = key if place in ("", "config", "container_config") else place
                _in_document(value, named, found)


def in_configuration(configuration: Mapping[str, Any]) -> list[Finding]:
    """Credentials in an image's configuration: variables, labels, commands, history."""
    found: list[Finding] = []
    _in_document(configuration, "", found)
    return list(dict.fromkeys(found))


def in_saved(stream: IO[bytes], base_layers: Collection[str] = ()) -> list[Finding]:
    """Credentials in what `docker save` writes, in its old layout or as an OCI archive.

    Args:
        stream: a tar of one image.
        base_layers: DiffIDs (`sha256:…`) of layers that were somebody else's to look at.

    Raises:
        WorkspaceError: the stream ends early, or a layer cannot be read.
    """
    documents: dict[str, Any] = {}
    layers: dict[str, list[Finding] | None] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]
                name = member.name.removeprefix("./")
                if member.issym() or member.islnk():
                    # The same layer twice: the old layout links ../<layer>/layer.tar.
                    layers.setdefault(name, [])
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or name.rpartition("/")[2] in ("VERSION", "repositories"):
                    continue
                if name.replace("blobs/sha256/", "sha256:") in base_layers:
                    continue
                if name.endswith(".json") or _looks_like_json(file):
                    documents[name] = json.loads(file.read())
                elif name.endswith("/layer.tar") or name.startswith("blobs/"):
                    layers[name] = _in_layer(file)
            _expect_its_end(archive)
        (manifest,) = documents["manifest.json"]
        configuration = documents[manifest["Config"]]
        diff_ids = configuration["rootfs"]["diff_ids"]
        names = manifest["Layers"]
        found = in_configuration(configuration)
        for number, (diff_id, name) in enumerate(zip(diff_ids, names, strict=True), 1):
            if diff_id in base_layers:
                continue
            place = f"layer {number} of {len(names)}"
            inside = layers[name]
            if inside is None:
                raise WorkspaceError(
                    f"{place} of the image is packed in a way that cannot be searched for "
                    "credentials (zstd, or damaged); build the image with gzip or plain layers"
                )
            found += [replace(one, where=f"{one.where} in {place}") for one in inside]
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise WorkspaceError(
            f"what docker save wrote is not a whole image ({type(error).__name__}); check the "
            "engine's disk space and run it again"
        ) from None
    return found


def _looks_like_json(file: Any) -> bool:
    start: bytes = file.peek(512)[:512]
    return start.startswith((b"{", b"[")) and start[257:262] != b"ustar"


def _in_layer(file: IO[bytes]) -> list[Finding] | None:
    """What is found in a layer; None where it cannot be read, which matters not for a base's."""
    try:
        return in_tar(file)
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        return None


def in_image(docker: str, image: str, base_layers: Collection[str] = ()) -> list[Finding]:
    """Credentials in an image of an engine: its configuration, history, and layers.

    Args:
        docker: Docker's client.
        image: name or id.
        base_layers: DiffIDs (`sha256:…`) of layers that are not looked into.

    Raises:
        WorkspaceError: the image could not be read to its end.
    """
    (told,) = json.loads(_output(docker, "image", "inspect", image))
    if folders := _folders_of_layers(told):
        # No tar in the image, or no right to read there: the long way finds the same.
        with contextlib.suppress(WorkspaceError):
            return _in_folders(docker, told, folders, base_layers)
    with _stream(docker, "save", image) as stream:
        return in_saved(stream, base_layers)


def _output(docker: str, *arguments: str) -> bytes:
    with _stream(docker, *arguments) as stream:
        return stream.read()


@contextlib.contextmanager
def _stream(docker: str, *arguments: str) -> Iterator[IO[bytes]]:
    """What a command of Docker's client writes.

    Raises:
        WorkspaceError: the command failed, or what it wrote could not be read.
    """
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [docker, *arguments], stdout=subprocess.PIPE, stderr=complaints
        ) as process,
    ):
        assert process.stdout
        failed: Exception | None = None
        try:
            yield process.stdout
        except (WorkspaceError, tarfile.TarError) as error:
            failed = error
        process.stdout.close()
        # The command's own complaint says more; one that a signal ended has none: its reader left.
        if process.wait() > 0:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
            failed = WorkspaceError(lines[-1] if lines else f"docker {arguments[0]} failed")
        if failed or process.returncode:
            reason = failed or f"docker {arguments[0]} was ended"
            raise WorkspaceError(f"the image could not be searched for credentials: {reason}")


def _folders_of_layers(told: Mapping[str, Any]) -> list[str] | None:
    """Where the engine keeps each layer, the lowest first; None where it is not in folders.

    `docker save` of an image of 9 GB writes 9 GB to the engine's disk first (86 s on 2 cores), all
    for the last few MB.
    """
    driver = told.get("GraphDriver") or {}
    data = driver.get("Data") or {}
    if driver.get("Name") != "overlay2" or "UpperDir" not in data:
        return None
    lower = data["LowerDir"].split(":") if data.get("LowerDir") else []
    folders = [*reversed(lower), data["UpperDir"]]
    return folders if len(folders) == len(told["RootFS"]["Layers"]) else None


# Without its log: the engine would write all that tar writes to a file as well.
_TAR = ("run", "--rm", "--network=none", "--log-driver=none", "--user=0", "--entrypoint=tar")


def _in_folders(
    docker: str, told: Mapping[str, Any], folders: list[str], base_layers: Collection[str]
) -> list[Finding]:
    image = told["Id"]
    lines = _output(docker, "history", "--no-trunc", "--format", "{{json .}}", image).splitlines()
    steps = [json.loads(line) for line in reversed(lines)]
    history = [{"created_by": step["CreatedBy"], "comment": step["Comment"]} for step in steps]
    parts = {"config": "Config", "container_config": "ContainerConfig", "author": "Author"}
    configuration = {name: told.get(key) for name, key in parts.items()}
    found = in_configuration({**configuration, "history": history})
    for number, (diff_id, folder) in enumerate(
        zip(told["RootFS"]["Layers"], folders, strict=True), 1
    ):
        if diff_id in base_layers:
            continue
        mount = f"type=bind,source={folder},target=/layer,readonly"
        place = f"layer {number} of {len(folders)}"
        with _stream(docker, *_TAR, "--mount", mount, image, "-C", "/layer", "-c", ".") as stream:
            inside = in_tar(stream)
        found += [replace(one, where=f"{one.where} in {place}") for one in inside]
    return found
