"""Who a caller is, by the API key that was presented."""

from dataclasses import dataclass

from bot.access.keys import ApiKeys
from bot.access.roles import LOCAL, Principal
from prompt_bank.errors import AuthenticationError


@dataclass(frozen=True, slots=True)
class Entrance:
    """Without `keys`, API keys are off and everybody is LOCAL."""

    keys: ApiKeys | None

    async def principal(self, secret: str | None) -> Principal:
        """Raises AuthenticationError, whose text never holds the secret."""
        if self.keys is None:
            return LOCAL
        if secret is None:
            raise AuthenticationError("no API key was given; send one as `Authorization: Bearer fd-...`")
        key = await self.keys.find(secret)
        if key is None:
            raise AuthenticationError("this API key is not known here; check it, or ask the operator for one")
        if key.state != "live":
            raise AuthenticationError(f"the API key {key.principal.name!r} is {key.state}; ask the operator for a new one")
        return key.principal
