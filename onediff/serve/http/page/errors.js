/**
 * An error with a text for the user: what went wrong, and what the user can do.
 *
 * `canRetry` says whether the same request can succeed later, `needsKey` whether an API key is missing or wrong, and
 * `isTooLarge` whether smaller pictures would be accepted.
 */
export class PlainError extends Error {
  constructor(title, detail = "", { canRetry = true, needsKey = false, isTooLarge = false } = {}) {
    super(title);
    Object.assign(this, { title, detail, canRetry, needsKey, isTooLarge });
  }
}
