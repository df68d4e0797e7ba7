/**
 * An error with a text for the user: what went wrong, and what the user can do.
 *
 * `canRetry` says whether the same request can succeed later, and `needsKey` whether an API key is missing or wrong.
 */
export class PlainError extends Error {
  constructor(title, detail = "", { canRetry = true, needsKey = false } = {}) {
    super(title);
    Object.assign(this, { title, detail, canRetry, needsKey });
  }
}
