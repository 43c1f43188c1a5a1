"""api.test, auth.*, oauth.v2.access and apps.*: who calls, how tokens come about and how they end."""

from bot.channels.slack.sandbox.credentials import TOKEN_LIFETIME_S, Grant
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.world import Json


def _api_test(call: Call) -> Json:
    if call.arguments.has("error"):
        raise MethodError(call.arguments.text("error"))
    return {"args": call.arguments.public}


def _auth_test(call: Call) -> Json:
    workspace = call.bot.workspace
    return {
        "url": f"https://{workspace.domain}.slack.com/",
        "team": workspace.name,
        "team_id": workspace.id,
        "user": call.bot.bot_user.name,
        "user_id": call.bot.bot_user.id,
        "bot_id": call.bot.bot_id,
        "is_enterprise_install": False,
    }


def _auth_revoke(call: Call) -> Json:
    if call.arguments.flag("test"):
        return {"revoked": False}
    call.core.credentials.revoke(call.bot)
    call.core.events.tokens_revoked(call.bot)
    return {"revoked": True}


def _uninstall(call: Call) -> Json:
    if call.app_by_secret() is not call.bot.app:
        raise MethodError("client_id_token_mismatch")
    call.core.uninstall(call.bot)
    return {}


def _connections_open(call: Call) -> Json:
    assert call.token is not None
    address = call.core.base_url.replace("http://", "ws://")
    return {"url": f"{address}/link?ticket={call.core.socket.new_ticket(call.token.app)}"}


def _oauth_access(call: Call) -> Json:
    app, arguments = call.app_by_secret(), call.arguments
    if arguments.text("grant_type") == "refresh_token":
        installation = call.core.credentials.take_refresh_token(app, arguments.text("refresh_token"))
    elif arguments.has("code"):
        redirect_uri = arguments.text("redirect_uri") or None
        workspace, installer_id, scopes = call.core.credentials.take_code(app, arguments.text("code"), redirect_uri)
        installation = call.core.world.install(app, workspace, installer_id, scopes)
    else:
        raise MethodError("invalid_arguments", "[ERROR] missing required field: code")
    return _grant_record(call.core.credentials.grant(installation))


def _grant_record(grant: Grant) -> Json:
    installation = grant.installation
    answer: Json = {
        "access_token": grant.token.value,
        "token_type": "bot",
        "scope": ",".join(sorted(installation.scopes)),
        "bot_user_id": installation.bot_user.id,
        "app_id": installation.app.id,
        "team": {"id": installation.workspace.id, "name": installation.workspace.name},
        "enterprise": None,
        "is_enterprise_install": False,
        "authed_user": {"id": installation.installer_id},
    }
    if grant.refresh_token is not None:
        answer |= {"refresh_token": grant.refresh_token, "expires_in": TOKEN_LIFETIME_S}
    return answer


METHODS = {
    "api.test": Method(_api_test, token=None),
    "apps.connections.open": Method(_connections_open, token="app"),
    "apps.uninstall": Method(_uninstall, ("client_id", "client_secret")),
    "auth.revoke": Method(_auth_revoke),
    "auth.test": Method(_auth_test),
    "oauth.v2.access": Method(_oauth_access, ("client_id", "client_secret"), token=None),
}
