# SPDX-License-Identifier: Apache-2.0
"""Formats of credentials: tokens, private keys, logins, and names of settings that hold one.

The formats are public: their owners document them, and rule sets for scanners list them.
"""

from __future__ import annotations

import re

TOKENS = [
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
"""(kind, format). Each format has 20 letters, digits or signs of `-_~%+` in a row: the search in
content looks for those first."""


def _any_token() -> re.Pattern[bytes]:
    """All formats, grouped by first character: most are ruled out at once, in half the time."""
    by_first: dict[str, list[str]] = {}
    for _, shape in TOKENS:
        plain = re.match(r"[A-Za-z0-9](?![{?*+])", shape)
        by_first.setdefault(plain[0] if plain else "", []).append(shape[1 if plain else 0 :])
    parts = "|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in by_first.items())
    # The preceding character is matched first: searching for one of a set is fast.
    return re.compile(rf"\W(?:(?<=\\)[nrt])?({parts})(?!\w)".encode(), re.ASCII)


TOKEN = _any_token()
PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    rb"(?:\s|\\[nr])*(?:[\w-]+: [^\n]*\n\s*)*[A-Za-z0-9+/=]{16}"
)
URL_WITH_PASSWORD = re.compile(
    # A variable reference is not a value; a long user name with digits and no password is a token.
    rb"[a-z]://(?:[^\s/:@\"'`<>]*:(?![$<{*%])(?P<password>[^\s/@\"'`<>]+)"
    rb"|(?=[^\s/:@]*\d)[\w-]{20,})@[\w\[]",
    re.ASCII,
)
AZURE_ACCOUNT_KEY = re.compile(rb"Key=(?P<password>[A-Za-z0-9+/]{42,}={0,2})")
"""Not in TOKENS: base64 with many slashes has no run of 20 letters and digits."""
CONDA_TOKEN = re.compile(rb"://[^\s\"']*/t/(?!<)[\w-]{8,}/", re.ASCII)
REGISTRY_LOGIN = re.compile(rb"auth\\?\"\s*:\s*\\?\"([A-Za-z0-9+/]{8,}={0,2})")
CREDENTIAL_NAME = re.compile(
    r"\w*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE)\w*|"
    r"(?:\w*_)?(?:PASS|PAT|CREDENTIALS?|AUTH|AUTH_?CONFIG)|\w*_PWD|(?-i:[pP]wd)|"
    r"\w*_?AUTH_?TOKEN|\w*TOKEN(?:_\d+)?|"
    r"\w*(?:API|ACCESS|PRIVATE|MASTER|ENCRYPTION|SIGNING|DEPLOY|ACCOUNT|ADMIN|STORAGE|SHARED|AUTH|"
    r"SUBSCRIPTION|SERVICE)_?KEY(?:_ID|_DATA|_\d+)?|"
    r"CLIENT_KEY_DATA|SSH_KEY",
    re.IGNORECASE | re.ASCII,
)
NOT_A_CREDENTIAL_NAME = re.compile(
    r"GOOGLE_APPLICATION_CREDENTIALS|"
    r".*_(?:FILE|PATH|DIR|FOLDER|NAME|PROVIDER|HELPER|SOCK|ENDPOINT|TYPE|TTL|EXPIRES?|STDIN)",
    re.IGNORECASE,
)
HINTS = ("secret", "pass", "token", "key", "pwd", "auth", "cred", "_pat", "login", "user", " -u ")
"""A line without any of these assigns no credential."""
NO_VALUE = re.compile(
    r"[\"']?(?:|[$<{*].*|true|false|yes|no|on|off|none|null|\d{1,8}|x+|\.+)[\"']?",
    re.IGNORECASE | re.DOTALL,
)
PLACEHOLDER = re.compile(
    r"example|placeholder|change.?(?:me|it)|your[\W_]|dummy|redacted|12345678|abcdef|x{6}|\*{3}",
    re.IGNORECASE,
)
REFERENCE = re.compile(
    r"[$%~!@].*|.*[\s\\(){}\[\]<>`].*|.*://.*|(?:vault|env|file|arn|op|ref|sha\d+|md5):.*",
    re.DOTALL,
)
_WORD = r"(?:(?:[A-Z]?[a-z]{2,}+|[A-Z]{2,}+)++\d{0,3}|\d{1,3}|[A-Za-z]\d?)"
WORDS_AND_NUMBERS = re.compile(rf"[\W_]*{_WORD}(?:[\W_]+{_WORD})*")
ASSIGNMENT = re.compile(
    # <add key="name" value="value"/>
    r"""(?:key|name)=["'](?P<key>\w[\w-]*)["']\s+value=(?P<entry>"[^"\n]*"|'[^'\n]*')"""
    # A line of a shell, TOML, INI, YAML, JSON, XML, .npmrc or .netrc. Inside a command line,
    # `A= b` assigns nothing to A. A value may hold assignments itself: "Server=db;Password=...".
    r"""|(?:(^[ \t]*)|(?<=[\s"'`.:/;|&?(\[{<,-]))_?(?P<name>\w[\w-]*)["'\]]{0,2}"""
    r"""(?:(?(3)[ \t]*(?:=>|:=|[:=])[ \t]*|(?:[ \t]*(?::|=>|:=)[ \t]*|[ \t]+=[ \t]*|[=>]))"""
    r"""|(?<=password)[ \t]+)(?=(?P<value>"[^"\n]{,999}"|'[^'\n]{,999}'|[^\s"',;&<]{1,999}))"""
    # A command's option.
    r"""|(?<=\s)--?(?P<option>\w[\w-]*)(?:=|[ ]+)(?P<given>"[^"\n]*"|'[^'\n]*'|[^\s"'-][^\s"']*)""",
    re.MULTILINE | re.ASCII,
)
AUTHORIZATION = re.compile(
    r"authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+([^\s$\"'<{]{8,})", re.IGNORECASE
)
LOGIN = re.compile(
    r"\s(?:-u|--user)[ =][\"']?[^\s:\"'$]+:([^\s\"'$]+)|\blogin\s.*\s-p[ =]?[\"']?([^\s\"'$]+)"
)
